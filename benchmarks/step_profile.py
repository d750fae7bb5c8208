"""Where does the time of a micro-batch go? The operators of one forward and backward of sft_v1.py's model on a CPU.

    python benchmarks/train.py --quick && python benchmarks/step_profile.py      one core, about a minute

SmolLM2-135M in bfloat16 on one thread, real conversations of benchmarks/work/train laid end to end up to TOKENS.
Prints torch.profiler's table and the shares of matmuls, of torch's attention kernel and of all else, with the rates
that the first two reach. machine_share of train.py counts every operation at the rate of matmuls.
"""

import common

import settings

# ---- Size ----
TOKENS = 4096  # of the micro-batch, at most
ROWS = 12  # of the table

# ==== Measurement ====

FOLDER = common.WORK / "train"


def measure():
    """Return (the profiler's table, the RESULT line's figures); runs in a child."""
    import datasets
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity, profile

    import model as sft_model

    torch.set_num_threads(1)
    stored, rows, tokens = datasets.load_from_disk(FOLDER / "prepared")["train"].with_format("numpy"), [], 0
    for row in stored:
        if tokens + len(row["input_ids"]) <= TOKENS:
            rows.append((row["input_ids"].astype(np.int64), row["assistant_masks"]))
            tokens += len(row["input_ids"])
    model = sft_model.load_model(str(FOLDER / "base"), 1024).to(torch.bfloat16)
    model(**sft_model.micro_batch([(ids[:64], np.ones(64, bool)) for ids, _ in rows[:1]])).backward()  # warm
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        model(**sft_model.micro_batch(rows)).backward()
    table = profiled.key_averages()
    seconds = {"matmul": 0.0, "attention": 0.0, "else": 0.0}
    for line in table:
        kind = (
            "attention"
            if "attention_for_cpu" in line.key
            else "matmul"
            if line.key in ("aten::mm", "aten::bmm")
            else "else"
        )
        seconds[kind] += line.self_cpu_time_total / 1e6
    config = model.causal_lm.config
    head_dim = config.hidden_size // config.num_attention_heads
    squares = sum(len(ids) ** 2 for ids, _ in rows)
    # Two matmuls forward and five backward (the scores are made again), each over half of a square.
    operations = 7 * squares * head_dim * config.num_attention_heads * config.num_hidden_layers
    figures = {f"{kind}_share": round(spent / sum(seconds.values()), 3) for kind, spent in seconds.items()}
    figures["matmul_gflops"] = round(
        sum(line.flops for line in table if line.key == "aten::mm") / seconds["matmul"] / 1e9, 1
    )
    figures["attention_gflops"] = round(operations / seconds["attention"] / 1e9, 1)
    return table.table(sort_by="self_cpu_time_total", row_limit=ROWS, max_name_column_width=50), {
        "tokens": tokens
    } | figures


def main(run):
    """Profile one micro-batch and print the RESULT line."""
    if not (FOLDER / "base").is_dir():
        raise SystemExit(f"{FOLDER} is missing. Run benchmarks/train.py first, --quick will do.")
    common.machine()
    table, figures = common.in_child(measure)
    print(table)
    common.result(**figures)


if __name__ == "__main__":
    main(settings.from_flags(globals()))
