"""Units of prepare: the survey of the checkpoint, and the token shards of one text."""

from collections.abc import Mapping
from typing import Any

from stages.checkpoint.folder import CONFIG_FILE, Checkpoint
from stages.contracts.arrow import Array
from stages.contracts.errors import InputError
from stages.contracts.paths import PLAN_FILE, TENSORS_FILE, tokens_file
from stages.contracts.tensors import TensorRow, write_tensors
from stages.contracts.tokens import write_tokens
from stages.contracts.units import Job, UnitResult
from stages.io.files import WrittenFile, write_json
from stages.io.texts import kind_of, list_files
from stages.model.families import number_in, text_config
from stages.model.survey import survey
from stages.prepare.documents import read_documents
from stages.prepare.ids import checked_ids, read_ids
from stages.prepare.tokens import POOL_FACTOR, draw_sequences


def survey_unit(job: Job) -> UnitResult:
    """Write `plan.json` and `tensors.arrow` of a checkpoint. args: model (folder)."""
    plan, rows = survey_tables(job.args["model"])
    tensors = write_tensors(job.stage_dir / TENSORS_FILE, rows)
    return UnitResult((tensors, write_json(job.stage_dir / PLAN_FILE, plan)), facts={"num_tensors": len(rows)})


def survey_tables(model: str) -> tuple[dict[str, Any], list[TensorRow]]:
    """The plan of a checkpoint folder and its tensors. Raises InputError as `survey` does."""
    plan, roles = survey(Checkpoint(model))
    rows = [
        TensorRow(
            name=role.entry.name,
            file=role.entry.file,
            dtype=role.entry.dtype,
            shape=role.entry.shape,
            num_bytes=role.entry.num_bytes,
            parameter=role.parameter,
            layer=role.layer,
            role=role.role,
            expert=role.expert,
            expert_axis=role.expert_axis,
            template=role.template,
            scheme=role.entry.packing.scheme if role.entry.packing else "",
        )
        for role in roles
    ]
    return plan, rows


def tokens_unit(job: Job) -> UnitResult:
    """Write the token shards of one text. args: sequences_per_shard, and those of `sequences`."""
    ids_ST = sequences(job.args)
    files: list[WrittenFile] = []
    step = job.args["sequences_per_shard"]
    for shard, start in enumerate(range(0, len(ids_ST), step)):
        files.append(write_tokens(job.stage_dir / tokens_file(shard), ids_ST[start : start + step]))
    return UnitResult(tuple(files), facts={"num_tokens": int(ids_ST.size)})


def sequences(args: Mapping[str, Any]) -> Array:
    """Token ids int32 [S, T] of one text.

    args: place (for messages), model (folder), trust_remote_code (for the tokenizer), data (files and folders), text_field,
    num_sequences, sequence_length, seed.
    Raises InputError for a text that is too short or unreadable, and for ids that are not the model's.
    """
    place, num_sequences, sequence_length = args["place"], args["num_sequences"], args["sequence_length"]
    checkpoint = Checkpoint(args["model"])
    text, config_place = text_config(checkpoint.config), str(checkpoint.folder / CONFIG_FILE)
    max_positions = number_in(text, "max_position_embeddings", config_place)
    if max_positions is not None and sequence_length > max_positions:
        raise InputError(f"{place}.sequence_length is {sequence_length} but the model has {max_positions} positions; lower it")
    files = [file.path for file in list_files(args["data"], place)]
    if kind_of(files[0].name) == "ids":
        ids_ST = read_ids(files[0], num_sequences, sequence_length, place)
    else:
        from stages.prepare.tokenizer import Tokenizer

        tokenizer = Tokenizer(checkpoint, args["trust_remote_code"])
        max_characters = POOL_FACTOR * num_sequences * sequence_length
        documents = read_documents(files, args["text_field"], args["seed"], max_characters, place)
        source = f"{place}.data ({files[0]}{f' and {len(files) - 1} more files' if len(files) > 1 else ''})"
        ids_ST = draw_sequences(map(tokenizer.encode, documents), num_sequences, sequence_length, args["seed"], source)
    vocab_size = number_in(text, "vocab_size", config_place)
    if vocab_size is None:
        raise InputError(f"{config_place} has no vocab_size; restore the config")
    return checked_ids(ids_ST, vocab_size, place)
