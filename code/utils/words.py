"""Numbers of things, as people write them."""


def counted(count: int, what: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{count} {what}{'' if count == 1 else 's'}"
