"""Units of prepare: the survey of the checkpoint, and the token shards of one text."""

from itertools import accumulate

import numpy as np

from stages.checkpoint.folder import CONFIG_FILE, Checkpoint
from stages.contracts.documents import write_documents
from stages.contracts.errors import InputError
from stages.contracts.paths import SURVEY_FILE, TENSORS_FILE, documents_file, tokens_file
from stages.contracts.survey import survey_values
from stages.contracts.tensors import write_tensors
from stages.contracts.tokens import UnpackedPlace, write_tokens
from stages.contracts.units import Job, UnitResult
from stages.contracts.windows import NO_TOKEN
from stages.io.files import WrittenFile, write_json
from stages.io.texts import kind_of, list_files
from stages.model.families import number_in, text_config
from stages.model.survey import survey_checkpoint
from stages.prepare.documents import read_documents, read_in_order
from stages.prepare.ids import check_ids, read_ids
from stages.prepare.spec import SurveyArgs, SurveyFacts, TextArgs, TokensArgs, TokensFacts
from stages.prepare.tokens import Drawn, draw_documents, draw_sequences, pool_tokens, slide

_BETWEEN = "\n\n"
"""Stands between documents that are read in order: so WikiText's lines are joined where perplexities are published."""
_CHECKED_TOKENS = 1 << 20
"""Tokens whose ids are checked at once."""


def survey_unit(job: Job[SurveyArgs]) -> UnitResult[SurveyFacts]:
    """Write the survey and the table of tensors of a checkpoint."""
    survey, tensors = survey_checkpoint(job.args.model)
    table = write_tensors(job.part_dir / TENSORS_FILE, tensors)
    files = (table, write_json(job.part_dir / SURVEY_FILE, survey_values(survey)))
    return UnitResult(SurveyFacts(len(tensors)), files)


def tokens_unit(job: Job[TokensArgs]) -> UnitResult[TokensFacts]:
    """Write the token shards of one text, and the fingerprints of its documents."""
    text, step = job.args.text, job.args.sequences_per_shard
    drawn, files = sequences(text), list[WrittenFile]()
    starts = range(0, len(drawn), step)
    firsts = [0, *accumulate(int((drawn.part(start, start + step) != NO_TOKEN).sum()) for start in starts)]
    for number, start in enumerate(starts):
        place = None if text.packing else UnpackedPlace(firsts[number], firsts[-1])
        path = job.part_dir / tokens_file(job.args.first_shard + number)
        files.append(write_tokens(path, drawn.part(start, start + step), place))
    files.append(write_documents(documents_file(job.part_dir, job.args.domain), drawn.documents()))
    return UnitResult(TokensFacts(firsts[-1], drawn.num_bytes), files)


def sequences(args: TextArgs) -> Drawn:
    """The sequences of one text.

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
        if args.format == "chat":
            raise InputError(f"{place}.format is chat, but {files[0]} holds token ids; leave format out")
        _check_stride(args, f"{files[0]} holds token ids, which are cut already", "give text")
        if not args.packing:
            raise InputError(f"{place}.packing is false, but {files[0]} holds token ids; leave packing out")
        drawn = Drawn(read_ids(files[0], num_sequences, sequence_length, place), np.arange(num_sequences))
    else:
        from stages.prepare.tokenizer import Tokenizer

        if args.format == "chat":
            _check_stride(args, "a chat is no text to slide over", "set format to text")
        tokenizer = Tokenizer(checkpoint, args.trust_remote_code, args.counts_bytes)
        max_characters = pool_tokens(num_sequences * sequence_length)
        documents = read_documents(
            files, args.text_field, args.seed, max_characters, place,
            is_chat=args.format == "chat", num_even=num_sequences if args.is_even else 1,
        )  # fmt: skip
        source = f"{place}.data ({files[0]}{f' and {len(files) - 1} more files' if len(files) > 1 else ''})"
        encoded = map(tokenizer.encode, documents)
        if not args.packing:
            drawn = draw_documents(encoded, num_sequences, sequence_length, source)
        elif args.stride is None:
            drawn = draw_sequences(encoded, num_sequences, sequence_length, args.seed, source, is_even=args.is_even)
        else:
            joined = _BETWEEN.join(read_in_order(files, args.text_field, max_characters, place))
            drawn = slide(tokenizer.encode(joined), num_sequences, sequence_length, args.stride, source)
    vocab_size = number_in(text, "vocab_size", config_place)
    if vocab_size is None:
        raise InputError(f"{config_place} has no vocab_size; restore the config")
    step = max(1, _CHECKED_TOKENS // sequence_length)
    for start in range(0, num_sequences, step):
        token_ids_ST = drawn.part(start, start + step)
        is_full = args.packing and args.stride is None
        check_ids(token_ids_ST if is_full else token_ids_ST[token_ids_ST != NO_TOKEN], vocab_size, place)
    return drawn


def _check_stride(args: TextArgs, reason: str, remedy: str) -> None:
    if args.stride is not None:
        place = args.place.partition(".")[0]
        raise InputError(f"{place}.perplexity.stride is {args.stride}, but {reason}; {remedy}, or leave it out")
