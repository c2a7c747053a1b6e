"""HTML pages in one file: everything they show is embedded, and nothing that was read becomes markup."""

from importlib.resources import files
from typing import Any

from slrmerge.io.text import IN_PROSE, printable


def render_page(package: str, name: str, **values: Any) -> str:
    """The template `name` of `package`, rendered.

    Texts are escaped, and so is what does not print; `embed("file")` in a template is the content of a file beside it.
    Needs jinja2.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def embed(asset: str, *, of: str = package) -> Markup:
        return Markup(_read(of, asset))  # noqa: S704 (a file of ours)

    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value, keep=IN_PROSE) if type(value) is str else value,
    )
    style = embed("page.css", of="slrmerge.io")
    return environment.from_string(_read(package, name)).render(embed=embed, style=style, **values)


def plotly_js() -> Any:
    """plotly.js as a trusted text. Needs plotly."""
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())  # noqa: S704 (a library, for a <script>)


def plotly_js_version() -> str:
    """The version of plotly.js. Needs plotly."""
    from plotly.offline import get_plotlyjs_version

    version: str = get_plotlyjs_version()
    return version


def _read(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")
