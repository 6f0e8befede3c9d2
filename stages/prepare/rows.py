"""Reads documents of Parquet files: only the columns that hold them, a few rows at a time."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from stages.prepare.chat import MESSAGES, TOOLS
from stages.prepare.reading import Document, Reader, Size

_BATCH_ROWS = 64
_BUFFER_BYTES = 1 << 20


class ParquetReader(Reader):
    """Each row is one document. A text column may contain strings or UTF-8 bytes, dictionary-encoded or not."""

    def measure(self) -> Size:
        """Number of rows and size of the columns that are read, from the file's footer alone."""
        with self._open() as file:
            names = self._columns(file.schema_arrow)
            metadata = file.metadata
            paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
            columns = [index for index, path in enumerate(paths) if path.partition(".")[0] in names]
            groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
            if any(group.num_rows < 0 for group in groups):
                raise self.error(" counts fewer rows than none; it is damaged: write the file again")
            num_bytes = sum(group.column(column).total_uncompressed_size for group in groups for column in columns)
            return Size(sum(group.num_rows for group in groups), max(0, num_bytes))

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, Document]]:
        """Read the row groups that contain wanted rows."""
        with self._open() as file:
            start = 0
            for group in range(file.metadata.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                inside = wanted[bisect_left(wanted, start) : bisect_left(wanted, start + num_rows)]
                if inside:
                    yield from self._read_group(file, group, start, inside)
                start += num_rows

    def _columns(self, schema: pa.Schema) -> list[str]:
        """The columns to read. Raises InputError where the text column is missing or holds no text, and where no column holds
        conversations."""
        if self.is_chat:
            found = [name for name in (*MESSAGES, TOOLS) if name in schema.names]
            if not set(found) & set(MESSAGES):
                raise self.error(f" has no column {' or '.join(MESSAGES)}; it has {', '.join(schema.names) or 'none'}")
            return found
        if self.text_field not in schema.names:
            raise self.missing(schema.names)
        kind = schema.field(self.text_field).type
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)
        if not is_text and not pa.types.is_binary(values) and not pa.types.is_large_binary(values):
            raise self.error(
                f": field {self.text_field!r} holds values of type {kind}; a text is needed: set {self.place}.text_field"
            )
        return [self.text_field]

    def _read_group(
        self, file: pq.ParquetFile, group: int, start: int, wanted: Sequence[int]
    ) -> Iterator[tuple[int, Document]]:
        left = iter(wanted)
        number = next(left, None)
        columns = self._columns(file.schema_arrow)
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
            while number is not None and number < start + len(batch):
                yield number, self._document(batch, number - start, f"row {number + 1:,}")
                number = next(left, None)
            start += len(batch)
            if number is None:
                return
        raise self.error(f", row {number} is not there, though the footer counts it; the file is damaged: write the file again")

    def _document(self, batch: pa.RecordBatch, row: int, where: str) -> Document:
        try:
            return self.document({name: batch.column(name)[row].as_py() for name in batch.schema.names}, where)
        except UnicodeDecodeError as e:
            raise self.error(f", {where}: byte {e.start + 1:,} is not UTF-8; convert the file to UTF-8") from e

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
