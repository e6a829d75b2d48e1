"""`python -m data.loose_json PATHS --name NAME`: files of text become a TFDS dataset."""

import argparse
import sys

from data.export.loose_json import LooseJson


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.loose_json", description=LooseJson.__doc__)
    add = parser.add_argument
    add("paths", metavar="PATHS", help="files, folders or globs, separated by commas: .jsonl, .txt, .parquet ...")
    add("--name", required=True, help="of the dataset: small letters, digits and _")
    add("--version", default="1.0.0", help="of the dataset (1.0.0)")
    add("--data-dir", metavar="DIR", help="where TFDS keeps datasets (TFDS_DATA_DIR, or ~/tensorflow_datasets)")
    add("--text-key", metavar="KEY", default="text", help="of a JSON object, or column of a table (text)")
    add("--tfrecord", action="store_true", help="for readers with tf.data; needs TensorFlow")
    flags = parser.parse_args(argv)
    try:
        builder = LooseJson(
            name=flags.name,
            paths=flags.paths,
            version=flags.version,
            data_dir=flags.data_dir,
            text_key=flags.text_key,
            file_format="tfrecord" if flags.tfrecord else "array_record",
        )
        if builder.data_path.exists():
            raise ValueError(f"{builder.data_path} is there already; remove it, or give another --version or --name.")
        builder.download_and_prepare()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 65
    count = builder.info.splits["train"].num_examples
    print(f"{builder.info.full_name}: {count:,} documents in {builder.data_path}")
    print(f"to train on it: data=TfdsText data.name={builder.name} data.data_dir={builder.data_path.parent.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
