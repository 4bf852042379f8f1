"""`spatial-tokens serve-export`: a base model and its adapter as one folder for vLLM."""

from argparse import Namespace

from spatial_tokens.cli.output import print_json
from spatial_tokens.serving import serve_export


def run(arguments: Namespace) -> None:
    """`spatial-tokens serve-export`: one folder of a base and its adapter."""
    out = arguments.output
    changed = serve_export(arguments.base, arguments.adapter, out, link=arguments.link)
    if arguments.json:
        print_json({"base": arguments.base, "adapter": arguments.adapter, "output": out, "config": changed})
        return
    print(f"wrote {out}: {', '.join(changed['architectures'])}")
    print(f"next, where vLLM and this library are installed: vllm serve {out}")
