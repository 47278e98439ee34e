"""Reads wandb's offline transaction log without wandb's own reader: LevelDB log blocks of protobuf records."""

import json
import struct
from pathlib import Path

BLOCK = 32768


def raw_records(path: Path) -> list[bytes]:
    """Return the payloads of a `.wandb` file."""
    data, position, parts, records = path.read_bytes(), 7, [], []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # blocks end with padding too short for a header
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or last of several
            records.append(b"".join(parts))
            parts = []
    return records


def history(path: Path) -> dict[int, dict[str, object]]:
    """Return step -> values of the last row logged for it."""
    from wandb.proto import wandb_internal_pb2

    rows: dict[int, dict[str, object]] = {}
    for raw in raw_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.setdefault(int(values.pop("_step")), {}).update(values)
    return rows
