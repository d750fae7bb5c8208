"""How much of the base to keep? Export and evaluate several shares of it, and print one table.

    python benchmarks/base_share.py                                        shares 0, 0.25, 0.5, 0.75
    LIMIT=200 python benchmarks/base_share.py --shares 0 0.5 --average 3   a quick look, of a mean of three checkpoints
    CHAT_TEMPLATE=1 python benchmarks/base_share.py                        by the chat pass: ifeval and gsm8k

The weights are (1 - share) * trained + share * base (export_hf.py --base-share). Each share is exported and measured by
run_eval.sh, which takes its settings from the environment: TASKS, LIMIT, DEVICE, DATA_DIR (for losses and answers of
its own check) and so on. Writes OUTPUT_DIR: an export for each share, eval-results, and table.md.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import common

from sft import settings, system
from sft.evaluation import compare_evals, eval_results

# ---- Shares ----
SHARES = ("0", "0.25", "0.5", "0.75")  # of the base's weights, 0 to 1, one export each
AVERAGE = 1  # checkpoints whose mean is the trained part, as in export_hf.py
# ---- Folders ----
CHECKPOINT_DIR = "checkpoints/sft_v1"  # folder of the run, written by sft_v1.py
CHECKPOINT = "latest"  # as in export_hf.py
RESIZED_MODEL = "models/resized"  # folder that the run started from
OUTPUT_DIR = "exports/base_share"  # folder to write; must be empty or missing

# ==== Runs ====


def run(*command, **environment):
    """Run a command in the current folder, with more environment variables; its failure ends this script."""
    if subprocess.run(command, env=os.environ | environment).returncode:
        raise SystemExit(f"{' '.join(command)} failed; its message stands above.")


def measure(share, args, output):
    """Export the weights with this share of the base, measure them, and return {column: value}."""
    name = f"share_{share.replace('.', '_')}"
    export, results, base = str(output / name), str(output / "eval-results"), args["RESIZED_MODEL"]
    same = ("CHECKPOINT_DIR", "CHECKPOINT", "RESIZED_MODEL", "AVERAGE")
    flags = common.flags({settings.flag_name(key): args[key] for key in same})
    flags += ["--base-share", share, "--export-dir", export, "--max-new-tokens", "20"]
    run(sys.executable, str(common.ROOT / "export_hf.py"), *flags)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # run_eval.sh takes the first python there
    script = str(common.ROOT / "run_eval.sh")
    run("bash", script, name, export, EVAL_RESULTS=results, RESIZED_MODEL=base, PATH=path)
    return scores(Path(results) / (f"{name}-chat" if os.environ.get("CHAT_TEMPLATE") == "1" else name))


def scores(folder):
    """Return {"LABEL METRIC": value} of a folder of run_eval.sh: lm_eval's tasks, and the built-in check if it ran."""
    results, values = eval_results.read_run(folder), {}
    for task, label, key, _ in compare_evals.plan_rows(results):
        values[f"{label} {compare_evals.metric_name(key)}"], _ = eval_results.value_of(results, task, key)
    if (folder / "assistant.json").is_file():
        for row in eval_results.read_json(folder / "assistant.json", compare_evals.ASSISTANT)["rows"]:
            values[f"{row['label']} {row['metric']}"] = statistics.fmean(row["after"], row["weights"])
    return values


def table(rows):
    """Return a Markdown table with a column for each share. rows: {share: {name: value}}."""
    lines = [f"| | {' | '.join(rows)} |", f"|---|{'---:|' * len(rows)}"]
    for name in next(iter(rows.values())):
        lines.append(f"| {name} | {' | '.join(f'{values[name]:.4f}' for values in rows.values())} |")
    return "\n".join(lines)


def main(args):
    """Measure each share, print the table after each, and the RESULT line."""
    output, rows = Path(args["OUTPUT_DIR"]), {}
    try:
        [float(share) for share in args["SHARES"]]
    except ValueError as error:
        raise SystemExit(f"SHARES: {error}. Name numbers from 0 to 1, such as 0 0.25.") from None
    system.refuse_unless_empty(output, "--output-dir")
    output.mkdir(parents=True, exist_ok=True)
    for share in args["SHARES"]:
        rows[share] = measure(share, args, output)
        (output / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
        print(f"\nShare of the base:\n\n{table(rows)}\n", flush=True)
    common.result(shares=",".join(rows), measures=len(rows[share]), table=output / "table.md")


if __name__ == "__main__":
    main(settings.from_flags(globals()))
