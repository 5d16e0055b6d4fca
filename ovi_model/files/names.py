"""Names of files, and what errors say, as they can be shown anywhere. Standard library only."""

import unicodedata


def printable(name: object) -> str:
    """A name, path or sentence as it can be sent and read anywhere.

    Bytes of a file name that are no UTF-8, control characters and invisible ones (those that turn the direction of
    writing among them) become backslash escapes; spaces of all widths stay.
    """
    return "".join(letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else _escaped(letter)
                   for letter in str(name))


def _escaped(letter: str) -> str:
    byte = ord(letter) - 0xDC00  # how Python keeps a byte of a name that is no UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else letter.encode("unicode_escape").decode()


def first_line(error: BaseException) -> str:
    """The first sentence of an error, without the advice PyTorch adds about unsafe loading."""
    text = str(error).strip().splitlines()
    return printable(text[0].split(". ")[0][:160] if text else type(error).__name__)
