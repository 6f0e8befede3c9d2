"""Units of prepare: the survey of the checkpoint, and the token shards of one text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.common.checkpoint import Checkpoint
from stages.common.errors import InputError
from stages.common.files import WrittenFile, write_json
from stages.common.paths import PLAN_FILE, TENSORS_FILE, tokens_file
from stages.common.schemas import TENSORS, TOKENS, write_table
from stages.common.tables import Array
from stages.common.unit import Job, UnitResult
from stages.prepare.survey import survey
from stages.prepare.tokens import ID_SUFFIXES, check_ids, crop_ids, draw_sequences, read_texts, read_token_ids


def survey_unit(job: Job) -> UnitResult:
    """Write `plan.json` and `tensors.arrow` (schema TENSORS) of a checkpoint. args: model (folder)."""
    plan, columns = survey_tables(job.args["model"])
    tensors = write_table(job.stage_dir / TENSORS_FILE, columns, TENSORS)
    return UnitResult((tensors, write_json(job.stage_dir / PLAN_FILE, plan)), facts={"num_tensors": len(columns["name"])})


def survey_tables(model: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The plan of a checkpoint folder and the columns of schema TENSORS. Raises InputError as `survey` does."""
    plan, roles = survey(Checkpoint(model))
    columns: dict[str, list[Any]] = {
        "name": [role.entry.name for role in roles],
        "file": [role.entry.file for role in roles],
        "dtype": [role.entry.dtype for role in roles],
        "shape": [list(role.entry.shape) for role in roles],
        "num_bytes": [role.entry.num_bytes for role in roles],
        "parameter": [role.parameter for role in roles],
        "layer": [role.layer for role in roles],
        "role": [role.role for role in roles],
        "expert": [role.expert for role in roles],
        "expert_axis": [role.expert_axis for role in roles],
        "template": [role.template for role in roles],
        "scheme": [role.entry.packing.scheme if role.entry.packing else "" for role in roles],
    }
    return plan, columns


def tokens_unit(job: Job) -> UnitResult:
    """Write the token shards of one text (schema TOKENS). args: sequences_per_shard, and those of `sequences`."""
    ids_ST = sequences(job.args)
    files: list[WrittenFile] = []
    step = job.args["sequences_per_shard"]
    for shard, start in enumerate(range(0, len(ids_ST), step)):
        rows = [row.tolist() for row in ids_ST[start : start + step]]
        files.append(write_table(job.stage_dir / tokens_file(shard), {"token_ids": rows}, TOKENS))
    return UnitResult(tuple(files), facts={"num_tokens": int(ids_ST.size)})


def sequences(args: Mapping[str, Any]) -> Array:
    """Token ids int32 [S, T] of one text.

    args: place (for messages), model (folder), trust_remote_code (for the tokenizer), data (paths), text_field, revision,
    num_sequences, sequence_length, seed.
    Raises InputError for a text that is too short or unreadable, and for ids that are not the model's.
    """
    place, data = args["place"], args["data"]
    num_sequences, sequence_length = args["num_sequences"], args["sequence_length"]
    checkpoint = Checkpoint(args["model"])
    text = checkpoint.config.get("text_config") or checkpoint.config
    max_positions = text.get("max_position_embeddings")
    if max_positions is not None and sequence_length > max_positions:
        raise InputError(f"{place}.sequence_length is {sequence_length} but the model has {max_positions} positions; lower it")
    if len(data) == 1 and Path(data[0]).suffix in ID_SUFFIXES:
        ids = crop_ids(read_token_ids(Path(data[0])), num_sequences, sequence_length, place)
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.local_folder, local_files_only=True, trust_remote_code=args["trust_remote_code"]
            )
        except (OSError, ValueError) as e:
            raise InputError(f"{checkpoint.folder} has no tokenizer that transformers can load: {e}") from e
        texts = read_texts(data, args["text_field"], args["seed"], args["revision"], place)
        documents = (tokenizer(document, verbose=False)["input_ids"] for document in texts)
        ids = draw_sequences(documents, num_sequences, sequence_length, args["seed"], place)
    check_ids(ids, int(text["vocab_size"]), place)
    return ids
