"""Words that were probably meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` with the known word that is spelt most like `word`, or an empty text.

    Where none is close, one that has the word in it is named: `h100` may mean `h100-80gb`.
    """
    names = list(known)
    longer = [name for name in names if len(word) > 1 and word in name]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    close = close or difflib.get_close_matches(word, longer, n=1, cutoff=0)
    return f"; did you mean {close[0]}?" if close else ""
