"""Cards: what the zoo knows of a named model, without importing it."""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparing.zoo.table import PAPERS, Loader, find_entry

WEIGHTS = Path(__file__).parent / "weights"

# Licences that allow commercial use; creative-commons ones with attribution or share-alike do, those with '-nc' do not.
_COMMERCIAL = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The card of one name. Licences are SPDX ids in lower case, or a sentence; None means not known.

    ``params`` counts parameters of the default configuration; ``source`` says where weights come from (None: there
    are none of this very model); ``loader`` says how far loading was proven ('verified', 'keys only', 'untested');
    ``measured`` holds numbers that commands of this repository printed, with their units in their names.
    """

    name: str
    task: str
    method: str | None
    host: str | None
    paper: str | None
    license_code: str
    license_weights: str | None
    license_data: str | None
    derived_from: str | None
    params: int | None
    source: str | None
    loader: Loader
    training: str | None
    notes: str
    measured: dict[str, Any]

    def commercial(self) -> bool:
        """Whether the licences allow commercial use, as far as the card knows.

        Code and weights need a licence that is known and allows it; data of unknown licence do not count against a
        model, data whose terms are known to forbid it do.
        """
        weights_ok = self.license_weights in _COMMERCIAL or (self.source is None and self.host is None)
        data_ok = (
            self.license_data is None or self.license_data in _COMMERCIAL or self.license_data.startswith("undisclosed")
        )
        return self.license_code in _COMMERCIAL and weights_ok and data_ok

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        unknown = {"source": "none of its own", "method": "none: a host", "notes": "", "training": ""}
        fields = {key: value for key, value in asdict(self).items() if key != "measured"}
        rows = [(key, unknown.get(key, "not known") if value in (None, "") else value) for key, value in fields.items()]
        rows = [(key, value) for key, value in rows if value != ""]
        rows += [(f"measured {key}", value) for key, value in self.measured.items()]
        width = max(len(key) for key, _ in rows)
        return "\n".join(
            f"{key:<{width}}  {value:,}" if isinstance(value, int) else f"{key:<{width}}  {value}"
            for key, value in rows
        )


def table_card(name: str) -> ModelCard:
    """The card of a name of the table; the measured numbers of a shipped model lie beside its weights.

    Raises:
        ValueError: the name is unknown; the message names the closest ones.
    """
    entry = find_entry(name)
    beside = _beside_weights(name) if entry.source == "shipped" else {}
    return ModelCard(
        name=name,
        task=entry.task,
        method=entry.method,
        host=entry.host,
        paper=PAPERS.get(entry.method or ""),
        license_code=entry.license_code,
        license_weights=entry.license_weights,
        license_data=entry.license_data,
        derived_from=entry.derived_from or entry.host,
        params=entry.params,
        source=entry.source,
        loader=entry.loader,
        training=beside.get("training"),
        notes=entry.notes,
        measured={**entry.measured, **beside.get("measured", {})},
    )


@lru_cache
def _beside_weights(name: str) -> dict[str, Any]:
    path = WEIGHTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
