"""A finished CSV of findings -> one Parquet file with the same rows, and back. Imports pyarrow."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from chexnet_deploy.runtime.table import ColumnKind

_TYPES: Final[Mapping[ColumnKind, pa.DataType]] = {
    "text": pa.string(),
    "count": pa.int64(),
    "probability": pa.float32(),
    "decision": pa.bool_(),
}
_BLOCK_BYTES: Final = 1 << 24  # some fifty thousand rows; each block becomes a row group


def write_parquet(source: Path, out: Path, columns: Mapping[str, ColumnKind], metadata: Mapping[str, str]) -> None:
    """Write a CSV's rows as Parquet, block by block; an empty field becomes null.

    Args:
        source: CSV with a header.
        out: replaced where it is there already.
        columns: kind by name, all that the CSV has.
        metadata: kept beside the schema.
    """
    options = pa.csv.ConvertOptions(
        column_types={name: _TYPES[kind] for name, kind in columns.items()},
        null_values=[""],
        strings_can_be_null=True,
        true_values=["1"],
        false_values=["0"],
    )
    blocks = pa.csv.open_csv(source, pa.csv.ReadOptions(block_size=_BLOCK_BYTES), convert_options=options)
    schema = blocks.schema.with_metadata(dict(metadata))
    with pa.parquet.ParquetWriter(out, schema) as writer:
        for block in blocks:
            writer.write_batch(block.cast(schema) if block.schema != schema else block)


def read_rows(path: Path) -> Iterator[list[str]]:
    """Yield the fields of each row as the CSV had them, byte for byte."""
    with pa.parquet.ParquetFile(path) as file:
        for block in file.iter_batches():
            for row in block.to_pylist():
                yield [_text(value) for value in row.values()]


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return str(np.float32(value)) if isinstance(value, float) else str(value)
