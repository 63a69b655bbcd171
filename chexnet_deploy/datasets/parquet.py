"""A Parquet table's columns as text, block by block. Imports pyarrow."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from chexnet_deploy.errors import DatasetError

_EXACT: Final = 2.0**53  # below it each whole number is a float of its own


def read_blocks(path: Path, n_rows: int) -> Iterator[Sequence[Sequence[str]]]:
    """Yield the columns' names, then up to `n_rows` rows at a time, column by column; null is an empty text.

    Raises:
        DatasetError: it is no readable Parquet file.
    """
    try:
        with pa.parquet.ParquetFile(path, memory_map=True) as file:
            yield [[name] for name in file.schema_arrow.names]
            for batch in file.iter_batches(n_rows):
                yield [_texts(column) for column in batch.columns]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as err:
        raise DatasetError(f"{path}: found {err}; needed a readable Parquet table. Next: write it again.") from err


def _texts(column: pa.Array) -> list[str]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return ["" if value is None else repr(value) for value in column.to_pylist()]
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [f"a {kind}"] * len(column)  # pictures, say: no column of a table of images
    texts: list[str] = pa.compute.fill_null(column.cast(kind).cast(pa.string()), "").to_pylist()
    return [_of_float(text) for text in texts] if pa.types.is_floating(kind) else texts


def _of_float(text: str) -> str:
    """Return a number's digits: pandas makes floats of whole numbers beside a gap, and 1.2e+12 would name somebody else."""
    if "e+" in text and abs(float(text)) < _EXACT:
        return f"{float(text):.0f}"
    return "" if text == "nan" else text
