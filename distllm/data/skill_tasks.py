"""The tasks of `data=skills`: a question, its one right answer, and a wrong one of the same length.

Difficulty is set for models of a few million parameters: short questions, short answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from distllm.data.stdlib import StdlibText
from distllm.errors import DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_WORDS = 600
"""How many of the corpus's most frequent words the word tasks draw from."""
MIN_CHOICE = 8
"""Words of a length are used when there are at least this many of them."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """A question, its right answer, and a wrong one with as many characters."""

    question: str
    answer: str
    wrong: str


@dataclass(frozen=True, slots=True)
class Material:
    """What the tasks draw from."""

    words: tuple[str, ...]
    """Frequent lowercase words of 3 to 7 letters."""
    by_length: dict[int, tuple[str, ...]]
    """The same words by their number of letters."""
    definitions: tuple[tuple[str, str], ...]
    """(module, name): names that only one module documents."""
    modules: dict[int, tuple[str, ...]]
    """Those modules by the length of their names."""


Task = Callable[[Random, Material], Exercise]


def gather(text: StdlibText) -> Material:
    """Pick words and definitions from the standard library's documentation."""
    counts: Counter[str] = Counter()
    for _, document in text.documents:
        counts.update(document.split())
    plain = (w for w in counts if 3 <= len(w) <= 7 and w.isascii() and w.isalpha() and w.islower())
    frequent = sorted(plain, key=lambda w: (-counts[w], w))[:NUM_WORDS]
    by_length = {n: words for n, words in _by_length(frequent).items() if len(words) >= MIN_CHOICE}
    words = tuple(word for group in by_length.values() for word in group)
    if not words:
        raise DataError(
            "The documentation of this Python holds too few words to draw tasks from "
            f"({len(counts)} different)."
        )
    names = Counter(name for _, name in text.definitions)
    definitions = tuple((m, n) for m, n in text.definitions if names[n] == 1)
    return Material(
        words,
        by_length,
        definitions,
        _by_length(sorted({module for module, _ in definitions})),
    )


def _by_length(items: Sequence[str]) -> dict[int, tuple[str, ...]]:
    return {n: tuple(i for i in items if len(i) == n) for n in sorted({len(i) for i in items})}


def copy_words(rng: Random, material: Material) -> Exercise:
    """Repeat one to three words."""
    words = rng.sample(material.words, rng.randint(1, 3))
    return _sequence("Copy: ", words, words, rng, _same_length_word(material))


def reverse_words(rng: Random, material: Material) -> Exercise:
    """Say two or three words in reverse order."""
    words = rng.sample(material.words, rng.randint(2, 3))
    return _sequence("Reverse: ", words, words[::-1], rng, _same_length_word(material))


def sort_words(rng: Random, material: Material) -> Exercise:
    """Sort two or three words."""
    words = rng.sample(material.words, rng.randint(2, 3))
    return _sequence("Sort: ", words, sorted(words), rng, _same_length_word(material))


def first_word(rng: Random, material: Material) -> Exercise:
    """Name the first of three to seven words."""
    return _pick(rng, material, "First of: ", 0)


def last_word(rng: Random, material: Material) -> Exercise:
    """Name the last of three to seven words."""
    return _pick(rng, material, "Last of: ", -1)


def reverse_letters(rng: Random, material: Material) -> Exercise:
    """Reverse two to four spaced letters."""
    letters = rng.choices(LETTERS, k=rng.randint(2, 4))
    return _sequence("Reverse: ", letters, letters[::-1], rng, _other(LETTERS))


def sort_digits(rng: Random, material: Material) -> Exercise:
    """Sort three to six digits."""
    digits = rng.choices("0123456789", k=rng.randint(3, 6))
    return _sequence("Sort: ", digits, sorted(digits), rng, _other("0123456789"))


def count_letter(rng: Random, material: Material) -> Exercise:
    """Count a letter among two to six spaced letters of a few kinds."""
    kinds = rng.sample(LETTERS, 3)
    letters = rng.choices(kinds, k=rng.randint(2, 6))
    answer = letters.count(kinds[0])
    wrong = rng.choice([n for n in range(len(letters) + 1) if n != answer])
    return Exercise(f"Count {kinds[0]} in: {' '.join(letters)}", str(answer), str(wrong))


def largest_number(rng: Random, material: Material) -> Exercise:
    """Name the largest of two or three different numbers below 100."""
    numbers = [str(n) for n in rng.sample(range(100), rng.randint(2, 3))]
    answer = max(numbers, key=int)
    others = [n for n in numbers if len(n) == len(answer) and n != answer]
    wrong = rng.choice(others) if others else _change_digit(rng, answer)
    return Exercise(f"Largest of: {' '.join(numbers)}", answer, wrong)


def largest_digit(rng: Random, material: Material) -> Exercise:
    """Name the largest of three to six different digits."""
    return _extreme_digit(rng, "Largest of: ", max)


def smallest_digit(rng: Random, material: Material) -> Exercise:
    """Name the smallest of three to six different digits."""
    return _extreme_digit(rng, "Smallest of: ", min)


def second_digit(rng: Random, material: Material) -> Exercise:
    """Name the second largest of three to six different digits."""
    return _extreme_digit(rng, "Second of: ", lambda digits: sorted(digits)[-2])


def letter_after(rng: Random, material: Material) -> Exercise:
    """Name the letter that follows a given one in a row of four to seven different letters."""
    letters = rng.sample(LETTERS, rng.randint(4, 7))
    place = rng.randrange(len(letters) - 1)
    answer = letters[place + 1]
    return Exercise(
        f"After {letters[place]} in: {' '.join(letters)}",
        answer,
        rng.choice([x for x in letters if x != answer]),
    )


def small_sum(rng: Random, material: Material) -> Exercise:
    """Add a number below 50 and one below 20."""
    left, right = rng.randrange(50), rng.randrange(20)
    answer = str(left + right)
    return Exercise(f"Add: {left} + {right}", answer, _change_digit(rng, answer))


def module_of(rng: Random, material: Material) -> Exercise:
    """Name the module that documents a class or function."""
    module, name = rng.choice(material.definitions)
    others = [m for m in material.modules[len(module)] if m != module]
    wrong = (
        rng.choice(others) if others else _replace_at(module, 0, _other(LETTERS)(rng, module[0]))
    )
    return Exercise(f"Which module documents {name}?", module, wrong)


TASKS: dict[str, Task] = {
    "copy_words": copy_words,
    "reverse_words": reverse_words,
    "sort_words": sort_words,
    "first_word": first_word,
    "last_word": last_word,
    "reverse_letters": reverse_letters,
    "sort_digits": sort_digits,
    "count_letter": count_letter,
    "largest_number": largest_number,
    "largest_digit": largest_digit,
    "smallest_digit": smallest_digit,
    "second_digit": second_digit,
    "letter_after": letter_after,
    "small_sum": small_sum,
    "module_of": module_of,
}
"""Name, as in `data.tasks`, -> task."""

_Substitute = Callable[[Random, str], str]


def _same_length_word(material: Material) -> _Substitute:
    """Return a function that swaps a word for another with as many letters."""
    return lambda rng, word: _another(rng, material.by_length[len(word)], word)


def _other(alphabet: str) -> _Substitute:
    """Return a function that swaps a character for another of the alphabet."""
    return lambda rng, character: _another(rng, alphabet, character)


def _another(rng: Random, pool: Sequence[str], item: str) -> str:
    """Draw from `pool`, which holds `item` and more, until it is another."""
    while (drawn := rng.choice(pool)) == item:
        pass
    return drawn


def _sequence(
    verb: str, items: Sequence[str], answer: Sequence[str], rng: Random, substitute: _Substitute
) -> Exercise:
    """Ask for `answer`; make it wrong by swapping two different elements or by replacing one."""
    wrong = list(answer)
    first, second = rng.sample(range(len(wrong)), 2) if len(wrong) > 1 else (0, 0)
    if wrong[first] != wrong[second] and rng.random() < 0.5:
        wrong[first], wrong[second] = wrong[second], wrong[first]
    else:
        wrong[first] = substitute(rng, wrong[first])
    return Exercise(verb + " ".join(items), " ".join(answer), " ".join(wrong))


def _pick(rng: Random, material: Material, verb: str, place: int) -> Exercise:
    """Ask for one of several words with as many letters, so that any other is as long."""
    pool = material.by_length[rng.choice(list(material.by_length))]
    words = rng.sample(pool, rng.randint(3, 7))
    answer = words[place]
    return Exercise(verb + " ".join(words), answer, rng.choice([w for w in words if w != answer]))


def _extreme_digit(rng: Random, verb: str, choose: Callable[[Sequence[str]], str]) -> Exercise:
    """Ask for one of several different digits."""
    digits = rng.sample("0123456789", rng.randint(3, 6))
    answer = choose(digits)
    wrong = rng.choice([d for d in digits if d != answer])
    return Exercise(verb + " ".join(digits), answer, wrong)


def _change_digit(rng: Random, number: str) -> str:
    """Change one digit, keeping the first one above zero in numbers of several digits."""
    place = rng.randrange(len(number))
    low = 1 if place == 0 and len(number) > 1 else 0
    digit = rng.choice([d for d in "0123456789"[low:] if d != number[place]])
    return _replace_at(number, place, digit)


def _replace_at(text: str, place: int, character: str) -> str:
    return text[:place] + character + text[place + 1 :]
