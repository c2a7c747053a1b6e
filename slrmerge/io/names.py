"""Names of files that somebody else chose."""


def is_inside(name: str) -> bool:
    """Whether a relative path, with `/` between its parts, leads to a place inside its folder on every system."""
    return not {"\\", ":", "\0"} & set(name) and not {"", ".", ".."} & set(name.split("/"))
