"""What the ``sidestream`` command reads from the environment."""

from tools.options.keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE

ENVIRONMENT_VARIABLES: dict[str, str] = {
    API_KEY_VARIABLE: "Of `serve`: its `--api-key`, several separated by spaces. Of the commands"
    " that ask a running server: the key that they send, the first of them.",
    ADMIN_KEY_VARIABLE: "Of `serve`: its `--admin-key`. Of the commands that ask a running server:"
    " the key that they send, before any other of the environment.",
    "XDG_RUNTIME_DIR": "Folder in which a server's sockets lie while it runs.",
    "XDG_CACHE_HOME": "In place of ~/.cache, where fetched adapters and row scales are kept unless"
    " an option says otherwise.",
    "NUMBA_CACHE_DIR": "Where the loader's compiled code is kept, in place of a folder there.",
    "HF_ENDPOINT": "In place of the Hub's own address, for `hf://`.",
}
"""By name. The clients of the Hub and of S3 read their credentials from further ones, as usual."""
