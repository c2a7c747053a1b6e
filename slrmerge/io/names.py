"""Names of files that come from elsewhere, such as a checkpoint or a manifest."""


def is_inside(name: str) -> bool:
    """Whether a relative path, with `/` between its parts, leads to a place inside its folder on every system."""
    return not {"\\", ":", "\0"} & set(name) and not {"", ".", ".."} & set(name.split("/"))
