"""Natural text that is installed with roe_jax: source and documentation of Python packages.

The corpus is the running Python's standard library and the permissively licensed packages of
`DISTRIBUTIONS`, which roe_jax depends on. Whole packages are in one split, so test text is of
packages that no training has seen. Nothing is stored: the text is read where it is installed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import importlib.metadata
import pathlib
import platform
import re
import sys
import sysconfig

SPLITS = ("test", "validation", "train")  # A file that several have is in the first of them.
# A module or package of the standard library is in a split by its name's hash, 1 : 1 : 8.
DISTRIBUTIONS = {
  "jax": "train",
  "numpy": "train",
  "flax": "train",
  "optax": "train",
  "chex": "train",
  "absl-py": "validation",
  "jinja2": "validation",
  "scipy": "test",
  "orbax-checkpoint": "test",
  "huggingface_hub": "test",
}
SUFFIXES = (".py", ".rst", ".md", ".txt")
LEAST_BYTES = 2000  # Smaller files are mostly imports and deprecated names.
LONGEST_LINE = 500  # Files with longer lines are data.
MOST_CHARACTERS = 20_000  # Of each file, so that few long ones do not make up the corpus.
_LEFT_OUT = re.compile(r"(?i)(^|/)(encodings|lib2to3|[^/]*\.dist-info)/|test")
PERMISSIVE = {
  "0BSD",
  "Apache-2.0",
  "Apache Software License",
  "BSD-2-Clause",
  "BSD-3-Clause",
  "BSD License",
  "CC0-1.0",
  "ISC",
  "MIT",
  "MIT License",
  "PSF-2.0",
  "Zlib",
}


@dataclasses.dataclass(frozen=True)
class Document:
  """A file: the name of its package, its path there, and its text."""

  package: str
  path: str
  text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of each split in a fixed order, and the packages' versions by name."""

  documents: Mapping[str, Sequence[Document]]
  versions: Mapping[str, str]

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of all that the corpus has."""
    found = hashlib.sha256()
    for split in SPLITS:
      for document in self.documents[split]:
        for part in (split, document.package, document.path, document.text):
          found.update(hashlib.sha256(part.encode()).digest())
    return found.hexdigest()


def check_license(distribution: importlib.metadata.Distribution) -> None:
  """Raises a ValueError unless all licenses that a distribution states are in `PERMISSIVE`."""
  metadata = distribution.metadata
  if expression := metadata["License-Expression"]:
    stated = re.split(r"\s+(?:AND|OR|WITH)\s+|[()\s]+", expression)
  else:
    classifiers = metadata.get_all("Classifier") or []
    stated = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: ")]
    stated = stated or [metadata["License"] or "no license"]
  if unknown := [name for name in stated if name and name not in PERMISSIVE]:
    raise ValueError(
      f"{metadata['Name']} states {unknown[0][:80]!r}, which is not among the permissive licenses "
      f"{', '.join(sorted(PERMISSIVE))}: leave it out of the corpus"
    )


def _split_of(module):
  """Returns the split of a module of the standard library; `_io` goes where `io` goes."""
  digest = hashlib.sha256(module.lstrip("_").encode()).digest()
  return {0: "test", 1: "validation"}.get(digest[0] % 10, "train")


def _standard_library(folder) -> Iterator[tuple[str, str, str, pathlib.Path]]:
  for top in sorted(folder.iterdir()):
    if (module := top.name.removesuffix(".py")) in sys.stdlib_module_names:
      for path in sorted(top.rglob("*.*")) if top.is_dir() else [top]:
        yield _split_of(module), module, path.relative_to(folder).as_posix(), path


def _installed(distributions, versions, search) -> Iterator[tuple[str, str, str, pathlib.Path]]:
  for name, split in distributions.items():
    settings = {} if search is None else {"path": search}
    found = next(iter(importlib.metadata.distributions(name=name, **settings)), None)
    if found is None:
      raise ValueError(f"the text corpus needs the package {name}: install it with pip")
    check_license(found)
    versions[name] = found.version
    for file in sorted(map(str, found.files or [])):
      yield split, name, file, pathlib.Path(str(found.locate_file(file)))


def _read(path: pathlib.Path) -> str | None:
  """Returns the whole text of a file, or None if it is too small or not text."""
  try:
    text = path.read_bytes().decode().replace("\r\n", "\n")
  except (OSError, UnicodeDecodeError):
    return None
  fits = len(text) >= LEAST_BYTES and max(map(len, text.split("\n"))) <= LONGEST_LINE
  return text if fits else None


def collect(
  standard_library: pathlib.Path | None = None,
  distributions: Mapping[str, str] | None = None,
  search: Sequence[str] | None = None,
) -> Corpus:
  """Reads the corpus.

  Args:
    standard_library: its folder; the running Python's by default.
    distributions: splits by package; `DISTRIBUTIONS` by default.
    search: where packages are looked for; `sys.path` by default.

  Raises:
    ValueError: a package is missing or not licensed permissively, or a split is empty.
  """
  folder = standard_library or pathlib.Path(sysconfig.get_paths()["stdlib"])
  versions = {"python": platform.python_version()}
  files: Iterable = [
    *_standard_library(folder),
    *_installed(DISTRIBUTIONS if distributions is None else distributions, versions, search),
  ]
  documents, seen = {split: [] for split in SPLITS}, set()
  for split, package, name, path in sorted(files, key=lambda file: SPLITS.index(file[0])):
    text = _read(path) if name.endswith(SUFFIXES) and not _LEFT_OUT.search(name) else None
    if text is not None and text not in seen:
      seen.add(text)
      documents[split].append(Document(package, name, text[:MOST_CHARACTERS]))
  if empty := [split for split in SPLITS if not documents[split]]:
    raise ValueError(f"{folder} and the installed packages have no text for the {empty[0]} split")
  return Corpus(documents, versions)
