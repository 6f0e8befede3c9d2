"""Units of prepare: the survey of the checkpoint, and the token shards of one text."""

from stages.checkpoint.folder import CONFIG_FILE, Checkpoint
from stages.contracts.arrow import Array
from stages.contracts.errors import InputError
from stages.contracts.paths import SURVEY_FILE, TENSORS_FILE, tokens_file
from stages.contracts.survey import survey_values
from stages.contracts.tensors import write_tensors
from stages.contracts.tokens import write_tokens
from stages.contracts.units import Job, UnitResult
from stages.io.files import write_json
from stages.io.texts import kind_of, list_files
from stages.model.families import number_in, text_config
from stages.model.survey import survey_checkpoint
from stages.prepare.documents import read_documents
from stages.prepare.ids import checked_ids, read_ids
from stages.prepare.spec import SurveyArgs, SurveyFacts, TextArgs, TokensArgs, TokensFacts
from stages.prepare.tokens import POOL_FACTOR, draw_sequences


def survey_unit(job: Job[SurveyArgs]) -> UnitResult[SurveyFacts]:
    """Write the survey and the table of tensors of a checkpoint."""
    survey, tensors = survey_checkpoint(job.args.model)
    table = write_tensors(job.part_dir / TENSORS_FILE, tensors)
    files = (table, write_json(job.part_dir / SURVEY_FILE, survey_values(survey)))
    return UnitResult(SurveyFacts(len(tensors)), files)


def tokens_unit(job: Job[TokensArgs]) -> UnitResult[TokensFacts]:
    """Write the token shards of one text."""
    ids_ST = sequences(job.args.text)
    step = job.args.sequences_per_shard
    files = [
        write_tokens(job.part_dir / tokens_file(shard), ids_ST[start : start + step])
        for shard, start in enumerate(range(0, len(ids_ST), step), job.args.first_shard)
    ]
    return UnitResult(TokensFacts(int(ids_ST.size)), files)


def sequences(args: TextArgs) -> Array:
    """Token ids int32 [S, T] of one text.

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
        ids_ST = read_ids(files[0], num_sequences, sequence_length, place)
    else:
        from stages.prepare.tokenizer import Tokenizer

        tokenizer = Tokenizer(checkpoint, args.trust_remote_code)
        max_characters = POOL_FACTOR * num_sequences * sequence_length
        documents = read_documents(
            files, args.text_field, args.seed, max_characters, place,
            is_chat=args.format == "chat", num_even=num_sequences if args.is_even else 1,
        )  # fmt: skip
        source = f"{place}.data ({files[0]}{f' and {len(files) - 1} more files' if len(files) > 1 else ''})"
        ids_ST = draw_sequences(
            map(tokenizer.encode, documents), num_sequences, sequence_length, args.seed, source, is_even=args.is_even
        )
    vocab_size = number_in(text, "vocab_size", config_place)
    if vocab_size is None:
        raise InputError(f"{config_place} has no vocab_size; restore the config")
    return checked_ids(ids_ST, vocab_size, place)
