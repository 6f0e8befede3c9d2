"""The texts of a run: one for each section that names one, or one for each of its domains."""

from dataclasses import dataclass

from stages.contracts.settings import RunConfig
from stages.contracts.text_settings import Domain, Format, TextData


@dataclass(frozen=True)
class Text:
    """Documents of one kind, and the sequences drawn from them.

    place: where the run file names it, `calibration` or `calibration.data.code`. section: `calibration` or `evaluation`.
    domain: its name; empty if the section has no domains. data, text_field, format, packing, revision, seed, num_sequences,
    sequence_length: as in `TextData`. shards: its token shards, numbered through the section.
    """

    place: str
    section: str
    domain: str
    data: tuple[str, ...]
    text_field: str
    format: Format
    packing: bool
    revision: str | None
    seed: int
    num_sequences: int
    sequence_length: int
    shards: range


@dataclass(frozen=True)
class DomainShards:
    """Token shards [first, stop) of a domain. name: empty if the text has no domains."""

    name: str
    first: int
    stop: int


def tokens_unit_name(domain: str) -> str:
    """Name of the unit of prepare that draws the sequences of a domain."""
    return f"tokens-{domain}" if domain else "tokens"


def domain_shards(data: TextData) -> tuple[DomainShards, ...]:
    """The token shards of every domain of a section, in their order."""
    return tuple(DomainShards(name, shards.start, shards.stop) for name, shards in data.shards_by_domain.items())


def sections_of(config: RunConfig) -> dict[str, TextData]:
    """The sections that name texts, by name."""
    sections: dict[str, TextData] = {"calibration": config.calibration}
    if config.evaluation is not None and config.evaluation.has_text:
        sections["evaluation"] = config.evaluation
    return sections


def texts_of(config: RunConfig) -> dict[str, Text]:
    """All texts of a run, by place."""
    return {text.place: text for name, data in sections_of(config).items() for text in texts_in(name, data)}


def texts_in(section: str, data: TextData) -> list[Text]:
    """The texts of a section, in the order of their token shards."""
    if isinstance(data.data, dict):
        named = {f"{section}.data.{name}": (name, domain) for name, domain in data.data.items()}
    else:
        named = {section: ("", Domain(data=data.data, revision=data.revision))}
    return [
        Text(
            place,
            section,
            name,
            domain.data,
            domain.text_field or data.text_field,
            domain.format or data.format,
            data.packing if domain.packing is None else domain.packing,
            domain.revision,
            data.seed,
            data.sequences_by_domain[name],
            data.sequence_length,
            data.shards_by_domain[name],
        )
        for place, (name, domain) in named.items()
    ]
