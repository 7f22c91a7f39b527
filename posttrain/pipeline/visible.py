"""Text of a model's, made safe to show."""

from __future__ import annotations

_SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_SIGNS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def visible(text: str) -> str:
    """Text with its control characters as signs of them (NUL as ␀), but for line ends and tabs.

    Models give such characters. With them a report is no text file to other programs and no valid HTML, and a terminal
    takes what follows an escape as a command.
    """
    return text.translate(_SIGNS)
