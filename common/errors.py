"""What the person at the keyboard can fix is one line; everything else keeps its traceback."""


class InputError(ValueError):
    """Something the person at the keyboard can fix; `cli.main` prints it in one line."""


class Stopped(InputError):
    """A run that was told to stop and has saved its state."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; CPU and MPS allocators say so in words only."""
    words = ("can't allocate memory", "out of memory")
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or any(word in str(error) for word in words))


def first_line(error: BaseException) -> str:
    """The first line of an error's words, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
