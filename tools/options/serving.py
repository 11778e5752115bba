"""The command line of ``sidestream serve``: what it serves, then every row of ``OPTIONS``."""

import argparse

from tools.options.keys import add_key_options
from tools.options.table import add_options
from tools.values import parse_name_and_path


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Every argument of ``sidestream serve``."""
    parser.add_argument(
        "model", metavar="MODEL", help="Folder of a model: config.json, safetensors, tokenizer."
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="What requests call the base model (default: the name of its folder).",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=parse_name_and_path,
        metavar="NAME=PATH",
        help="Serve the adapter in PATH, a folder or a GGUF file, or at hf://owner/name[@revision],"
        " s3://bucket/path or https://host/path, as NAME. May be given again.",
    )
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="NAME",
        help="Never evict this adapter of --lora or --lora-dir. May be given again.",
    )
    parser.add_argument(
        "--lora-dir",
        metavar="DIR",
        help="Every subfolder, and every NAME.gguf by the name NAME, is an adapter, looked at on"
        " first use.",
    )
    parser.add_argument(
        "--adapter-root",
        action="append",
        default=[],
        metavar="DIR",
        help="Adapters below DIR may be loaded while the server runs. May be given again.",
    )
    parser.add_argument(
        "--adapter-source",
        action="append",
        default=[],
        metavar="PREFIX",
        help="Adapters at hf://, s3:// and https:// addresses below PREFIX may be loaded while the"
        " server runs. May be given again.",
    )
    add_key_options(parser)
    add_options(parser)
