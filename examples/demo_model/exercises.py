"""Small functions that people ask a model for, which the standard library has no reason to hold.

The text of this module is training material: ``chats.py`` makes questions of the
docstrings and answers of the sources.  A first line reads "Return ..." or another
command, so that it can follow "a function that" and "How do I".
"""

from __future__ import annotations

import csv
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


def factorial(n: int) -> int:
    """Compute the factorial of a number."""
    result = 1
    for i in range(2, n + 1):
        result *= i
    return result


def fibonacci(n: int) -> list[int]:
    """Return the first n Fibonacci numbers."""
    numbers = []
    a, b = 0, 1
    for _ in range(n):
        numbers.append(a)
        a, b = b, a + b
    return numbers


def is_prime(n: int) -> bool:
    """Check whether a number is prime."""
    if n < 2:
        return False
    return all(n % divisor for divisor in range(2, int(n**0.5) + 1))


def primes_up_to(limit: int) -> list[int]:
    """List the prime numbers up to a limit."""
    is_candidate = [True] * (limit + 1)
    primes = []
    for n in range(2, limit + 1):
        if is_candidate[n]:
            primes.append(n)
            for multiple in range(n * n, limit + 1, n):
                is_candidate[multiple] = False
    return primes


def greatest_common_divisor(a: int, b: int) -> int:
    """Compute the greatest common divisor of two numbers."""
    while b:
        a, b = b, a % b
    return abs(a)


def is_even(n: int) -> bool:
    """Check whether a number is even."""
    return n % 2 == 0


def mean(values: list[float]) -> float:
    """Compute the average of a list of numbers."""
    return sum(values) / len(values)


def median(values: list[float]) -> float:
    """Compute the median of a list of numbers."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def celsius_to_fahrenheit(celsius: float) -> float:
    """Convert a temperature from Celsius to Fahrenheit."""
    return celsius * 9 / 5 + 32


def reverse_string(text: str) -> str:
    """Reverse a string."""
    return text[::-1]


def is_palindrome(text: str) -> bool:
    """Check whether a string is a palindrome."""
    letters = [c.lower() for c in text if c.isalnum()]
    return letters == letters[::-1]


def count_words(text: str) -> dict[str, int]:
    """Count the words of a text."""
    counts: dict[str, int] = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    return counts


def count_vowels(text: str) -> int:
    """Count the vowels in a string."""
    return sum(1 for c in text.lower() if c in "aeiou")


def are_anagrams(first: str, second: str) -> bool:
    """Check whether two strings are anagrams."""
    return sorted(first.lower()) == sorted(second.lower())


def capitalize_words(text: str) -> str:
    """Capitalize every word of a string."""
    return " ".join(word.capitalize() for word in text.split())


def remove_duplicates(items: list[Any]) -> list[Any]:
    """Remove the duplicates from a list."""
    seen = set()
    result = []
    for item in items:
        if item not in seen:
            seen.add(item)
            result.append(item)
    return result


def flatten(lists: list[list[Any]]) -> list[Any]:
    """Flatten a list of lists."""
    return [item for inner in lists for item in inner]


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Split a list into chunks of a given size."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def merge_dictionaries(first: dict[Any, Any], second: dict[Any, Any]) -> dict[Any, Any]:
    """Merge two dictionaries."""
    return {**first, **second}


def sort_by_value(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """Sort a dictionary by its values."""
    return dict(sorted(mapping.items(), key=lambda item: item[1]))


def binary_search(items: list[Any], target: Any) -> int:
    """Find an item in a sorted list by binary search."""
    low, high = 0, len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == target:
            return middle
        if items[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1


def bubble_sort(items: list[Any]) -> list[Any]:
    """Sort a list by bubble sort."""
    items = list(items)
    for end in range(len(items) - 1, 0, -1):
        for i in range(end):
            if items[i] > items[i + 1]:
                items[i], items[i + 1] = items[i + 1], items[i]
    return items


def quicksort(items: list[Any]) -> list[Any]:
    """Sort a list by quicksort."""
    if len(items) <= 1:
        return items
    pivot, *rest = items
    smaller = [item for item in rest if item < pivot]
    larger = [item for item in rest if item >= pivot]
    return [*quicksort(smaller), pivot, *quicksort(larger)]


def transpose(matrix: list[list[Any]]) -> list[list[Any]]:
    """Transpose a matrix."""
    return [list(row) for row in zip(*matrix, strict=True)]


def read_lines(path: str) -> list[str]:
    """Read the lines of a text file."""
    with open(path, encoding="utf-8") as file:
        return file.read().splitlines()


def read_json(path: str) -> Any:
    """Read a JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, value: Any) -> None:
    """Write a value to a JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


def read_csv(path: str) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def list_files(folder: str, suffix: str = "") -> list[Path]:
    """List the files in a folder."""
    return sorted(path for path in Path(folder).iterdir() if path.name.endswith(suffix))


def random_password(length: int = 16) -> str:
    """Generate a random password."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return "".join(random.SystemRandom().choice(alphabet) for _ in range(length))


def measure_time(function: Callable[[], Any]) -> float:
    """Measure how long a function takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def retry(function: Callable[[], Any], attempts: int = 3) -> Any:
    """Call a function again when it fails."""
    for attempt in range(attempts):
        try:
            return function()
        except Exception:
            if attempt == attempts - 1:
                raise


def fizz_buzz(n: int) -> list[str]:
    """Solve FizzBuzz."""
    lines = []
    for i in range(1, n + 1):
        word = "Fizz" * (i % 3 == 0) + "Buzz" * (i % 5 == 0)
        lines.append(word or str(i))
    return lines


class Stack:
    """Implement a stack."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def push(self, item: Any) -> None:
        self.items.append(item)

    def pop(self) -> Any:
        return self.items.pop()

    def is_empty(self) -> bool:
        return not self.items


class Node:
    """Hold one value of a linked list."""

    def __init__(self, value: Any, next_node: Node | None = None) -> None:
        self.value = value
        self.next_node = next_node


class LinkedList:
    """Implement a linked list."""

    def __init__(self) -> None:
        self.head: Node | None = None

    def push(self, value: Any) -> None:
        self.head = Node(value, self.head)

    def __iter__(self) -> Iterator[Any]:
        node = self.head
        while node is not None:
            yield node.value
            node = node.next_node
