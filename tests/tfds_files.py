"""TFDS folders written by hand, record by record: no TensorFlow, no download."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
CODE = {"mnist": ("mnist", "3.0.1"), "cifar10": ("cifar10", "3.0.2")}


def write_tfds(
    root: Path,
    name: str,
    splits: dict[str, tuple[np.ndarray, np.ndarray]],
    *,
    shards: int = 1,
    image_format: str = "PNG",
) -> Path:
    """Writes `{split: (x, y)}` as TFDS would prepare it; returns the version folder."""
    from array_record.python import array_record_module
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / CODE[name][0] / CODE[name][1]
    folder.mkdir(parents=True)
    split_infos = []
    for split, (x, y) in splits.items():
        parts = np.array_split(np.arange(len(x)), shards)
        for k, part in enumerate(parts):
            file = folder / f"{name}-{split}.array_record-{k:05d}-of-{shards:05d}"
            writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
            for i in part:
                encoded = io.BytesIO()
                Image.fromarray(x[i].squeeze()).save(encoded, image_format)
                example = tf_example_pb2.Example()
                example.features.feature["image"].bytes_list.value.append(encoded.getvalue())
                example.features.feature["label"].int64_list.value.append(int(y[i]))
                writer.write(example.SerializeToString())
            writer.close()
        lengths = [str(len(part)) for part in parts]
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        split_infos.append({"filepathTemplate": template, "name": split, "numBytes": "1", "shardLengths": lengths})
    info = {"name": name, "version": CODE[name][1], "fileFormat": "array_record", "splits": split_infos}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    kind = "tensorflow_datasets.core.features"
    shape = {"dimensions": [str(size) for size in SHAPES[name]]}
    features = {
        "image": {"pythonClassName": f"{kind}.image_feature.Image", "image": {"dtype": "uint8", "shape": shape}},
        "label": {
            "pythonClassName": f"{kind}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "10"},
        },
    }
    (folder / "features.json").write_text(
        json.dumps({"pythonClassName": f"{kind}.features_dict.FeaturesDict", "featuresDict": {"features": features}})
    )
    return folder


def random_split(rng: np.random.Generator, name: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images whose pixels differ in mean and spread, one pixel constant; labels of all classes."""
    low = rng.integers(0, 128, SHAPES[name])
    x = (low + rng.integers(0, 128, (n, *SHAPES[name])) * (rng.random(SHAPES[name]) < 0.7)).astype(np.uint8)
    x[:, 2, 3, 0] = 200
    return x, rng.permutation(np.arange(n) % 10)
