"""Units of prepare: the survey of the checkpoint, and the token shards of one text."""

from dataclasses import replace

import numpy as np

from stages.checkpoint.folder import CONFIG_FILE, Checkpoint
from stages.contracts.documents import write_documents
from stages.contracts.errors import InputError
from stages.contracts.paths import DOCUMENTS_FILE, SURVEY_FILE, TENSORS_FILE, tokens_file
from stages.contracts.survey import survey_values
from stages.contracts.tensors import write_tensors
from stages.contracts.tokens import write_tokens
from stages.contracts.units import Job, UnitResult
from stages.contracts.windows import NO_TOKEN
from stages.io.files import write_json
from stages.io.texts import kind_of, list_files
from stages.model.families import number_in, text_config
from stages.model.survey import survey_checkpoint
from stages.prepare.documents import read_documents, read_in_order
from stages.prepare.ids import checked_ids, read_ids
from stages.prepare.spec import SurveyArgs, SurveyFacts, TextArgs, TokensArgs, TokensFacts
from stages.prepare.tokens import POOL_FACTOR, Sequences, draw_sequences, slide

_BETWEEN = "\n\n"
"""Stands between documents that are read in order: so WikiText's lines are joined where perplexities are published."""


def survey_unit(job: Job[SurveyArgs]) -> UnitResult[SurveyFacts]:
    """Write the survey and the table of tensors of a checkpoint."""
    survey, tensors = survey_checkpoint(job.args.model)
    table = write_tensors(job.part_dir / TENSORS_FILE, tensors)
    files = (table, write_json(job.part_dir / SURVEY_FILE, survey_values(survey)))
    return UnitResult(SurveyFacts(len(tensors)), files)


def tokens_unit(job: Job[TokensArgs]) -> UnitResult[TokensFacts]:
    """Write the token shards of one text, and the fingerprints of its documents."""
    found = sequences(job.args.text)
    ids_ST = found.token_ids_ST
    step = job.args.sequences_per_shard
    files = [
        write_tokens(job.part_dir / tokens_file(shard), ids_ST[start : start + step])
        for shard, start in enumerate(range(0, len(ids_ST), step))
    ]
    files.append(write_documents(job.part_dir / DOCUMENTS_FILE, found.documents))
    return UnitResult(TokensFacts(int((ids_ST != NO_TOKEN).sum()), found.num_bytes), files)


def sequences(args: TextArgs) -> Sequences:
    """Sequences of one text, token ids int32 [S, T].

    Raises InputError for a text that is too short or unreadable, and for ids outside the model's vocabulary.
    """
    place, num_sequences, sequence_length = args.place, args.num_sequences, args.sequence_length
    checkpoint = Checkpoint(args.model)
    text, config_place = text_config(checkpoint.config), str(checkpoint.folder / CONFIG_FILE)
    max_positions = number_in(text, "max_position_embeddings", config_place)
    if max_positions is not None and sequence_length > max_positions:
        raise InputError(f"{place}.sequence_length is {sequence_length} but the model has {max_positions} positions; lower it")
    files = [file.path for file in list_files(args.data, place)]
    if kind_of(files[0].name) == "ids":
        if args.stride is not None:
            raise InputError(
                f"{place}.perplexity.stride is {args.stride}, but {files[0]} holds token ids, which are cut already; give "
                f"text, "
                "or leave it out"
            )
        ids_ST = read_ids(files[0], num_sequences, sequence_length, place)
        found = Sequences(ids_ST, list(ids_ST.astype(np.int64)), None)
    else:
        from stages.model.tokenizer import Tokenizer

        tokenizer = Tokenizer(checkpoint, args.trust_remote_code)
        max_characters = POOL_FACTOR * num_sequences * sequence_length
        source = f"{place}.data ({files[0]}{f' and {len(files) - 1} more files' if len(files) > 1 else ''})"
        if args.stride is None:
            documents = read_documents(files, args.text_field, args.seed, max_characters, place)
            found = draw_sequences(map(tokenizer.encode, documents), num_sequences, sequence_length, args.seed, source)
        else:
            joined = _BETWEEN.join(read_in_order(files, args.text_field, max_characters, place))
            found = slide(tokenizer.encode(joined), num_sequences, sequence_length, args.stride, source)
    vocab_size = number_in(text, "vocab_size", config_place)
    if vocab_size is None:
        raise InputError(f"{config_place} has no vocab_size; restore the config")
    is_token_ST = found.token_ids_ST != NO_TOKEN if args.stride is not None else np.True_
    checked_ST = checked_ids(np.where(is_token_ST, found.token_ids_ST, 0), vocab_size, place)
    return replace(found, token_ids_ST=np.where(is_token_ST, checked_ST, np.int32(NO_TOKEN)))
