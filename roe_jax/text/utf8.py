"""Text files: UTF-8 whatever the locale, with line ends as they are in the file."""

import pathlib


def read(path: str | pathlib.Path) -> str:
  """Reads a text file.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: it is not UTF-8.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist")
  return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, name: str) -> str:
  """Decodes UTF-8, with or without a byte order mark; `name` is the source in the error.

  Raises:
    ValueError: the bytes are not UTF-8.
  """
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    found = "it is UTF-16" if utf16 else f"byte {data[error.start]:#04x} at offset {error.start}"
    raise ValueError(
      f"{name} is not UTF-8 text ({found}): convert it, for example with iconv -f "
      f"{'UTF-16' if utf16 else 'LATIN1'} -t UTF-8"
    ) from error
