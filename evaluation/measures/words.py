"""Words of a text in any script: what all measures on text compare.

`rouge-score`'s own tokenizer drops every letter beyond `a-z0-9`, so that a Russian or Chinese
answer would always score zero. On ASCII text the words here are its tokens, but that numbers up to
twenty are digits however they are written: who says `7` has said `seven`.
"""

import functools
import re
import unicodedata

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_COUNTED = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
_COUNTED += " fifteen sixteen seventeen eighteen nineteen twenty"
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED.split())}
# Normalisation would glue them to a number in front: 9\u00be became 93\u20444.
_FRACTION = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])")

# Scripts that put no space between words; there a letter with its marks is the token, which is
# what character-level ROUGE for Chinese does.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@functools.lru_cache(maxsize=1 << 14)
def split_words(text: str) -> tuple[str, ...]:
    """Return the words of a text in any script, without case, width, punctuation or blanks.

    In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) every
    letter is a word.
    """
    text = _FRACTION.sub(" ", text)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = _ASCII_WORD.findall(folded) if folded.isascii() else _words_of_any_script(folded)
    return tuple(_NUMBERS.get(word, word) for word in words)


def _words_of_any_script(folded: str) -> list[str]:
    words: list[str] = []
    in_word = in_spaced_word = False
    for character in folded:
        category = unicodedata.category(character)
        if category == "Cf":  # joiners and soft hyphens stand inside words and are no letters
            continue
        if character.isalnum():
            spaced = _UNSPACED.match(character) is None
            if spaced and in_spaced_word:
                words[-1] += character
            else:
                words.append(character)
            in_word, in_spaced_word = True, spaced
        elif category[0] == "M" and in_word:
            words[-1] += character
        else:
            in_word = in_spaced_word = False
    return words
