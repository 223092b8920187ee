"""The page of `make bench`: one JSON file's records as tables and pictures."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hybridrl_lib.records.files import write_whole
from hybridrl_lib.report.style import MARKERS, as_bytes, legend_below, new_figure, palette, style
from hybridrl_lib.report.text import markdown_table

AXES = {"samples": ("samples", "G (completions a prompt)"),
        "length": ("length", "completion length (tokens)"),
        "prompts": ("prompts", "prompts a step"),
        "model": ("parameters", "model size (weights)")}
OTHER_SIDE = {"against_trl": "GRPO step against TRL's", "packing": "update, prompt packed once",
              "against_generate": "sampler against generate"}


def write_page(found: dict[str, Any], path: Path) -> None:
    """Writes the page and its pictures beside it.

    Args:
        found: what `suite.py` keeps: `device`, `cases`, `left_out`.
        path: of the page; pictures are named after it.
    """
    records = found["cases"]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records.values():
        by_kind.setdefault(record["benchmark"], []).append(record)
    def once(key: str) -> str:
        return " and ".join(sorted({str(r[key]) for r in records.values() if key in r}))

    parts = ["# Speed", f"{found['device']}, threads: {once('threads')}; torch {once('torch')}, "
             f"transformers {once('transformers')}, TRL {once('trl') or 'not measured'}; commit "
             f"{once('git_commit')}. Made by `make bench`; every number is in "
             f"[{path.stem}.json]({path.stem}.json), what is timed is in "
             "[benchmarks/README.md](../../../benchmarks/README.md).",
             "A ratio is how many times faster this library is than the other side, measured in "
             "alternating pairs: the median pair, and in brackets the smallest and the largest. "
             "*Best runs* divides the other side's shortest time by ours, which other work on the "
             "machine disturbs least."]
    compared = [r for kind in OTHER_SIDE for r in by_kind.get(kind, ())]
    if compared:
        parts += ["## Ratios", ratio_table(compared), parts_text(by_kind.get("against_trl", ())),
                  "## Settings of both sides", *map(settings_text, compared)]
    if "ceiling" in by_kind:
        parts += ["## What the machine can do", ceiling_table(by_kind["ceiling"]),
                  bounds_text(by_kind["ceiling"], by_kind.get("against_trl", ()))]
    for record in by_kind.get("scaling", ()):
        parts += ["## How time and memory grow", *scaling_section(record, path)]
    for record in by_kind.get("overhead", ()):
        milliseconds = " and ".join(f"{stage} {time:.0f} ms" for stage, time
                                    in record["plain_milliseconds"].items())
        parts += ["## What methods add", "Processor time of a method's own code in a step, its own "
                  "passes through the model excepted, beyond that of SFT, then RL: at the tiny "
                  f"model, where a step is shortest ({milliseconds}).", overhead_table(record)]
    for record in by_kind.get("full_size", ()):
        parts += ["## The paper's model size", f"{record['model']}: two steps a stage, evaluation "
                  "and saving included.", full_size_table(record)]
    for record in by_kind.get("verdicts", ()):
        parts += ["## Verifier", markdown_table(
            ["verdicts", "a second", "a second of processor time"],
            [[kind, f"{record[kind]['per_second_median']:.0f}",
              f"{record[kind]['per_processor_second_median']:.0f}"]
             for kind in ("numeric", "symbolic")], (1, 2))]
    if found["left_out"]:
        parts += ["## Left out here",
                  "\n".join(f"- `{name}`: {why}" for name, why in found["left_out"].items())]
    write_whole(path, "\n\n".join(part.strip() for part in parts if part) + "\n")


def workload(record: dict[str, Any]) -> str:
    """What was computed, in words."""
    words = (f"{record['prompts']} prompts x {record['samples']}, "
             f"{'' if record['lengths'] == 'fixed' else 'at most '}"
             f"{record['max_new_tokens']} tokens")
    if record.get("groups") == "signal":
        words += ", every other group without signal"
    return words


def ratio_table(records: Sequence[dict[str, Any]]) -> str:
    """A line a comparison: the pairs' median ratio with the smallest and the largest.

    README.md quotes its lines.
    """
    return markdown_table(
        ["how many times faster", "model", "precision", "work", "pairs", "median [from, to]",
         "best runs"],
        [[OTHER_SIDE[r["benchmark"]], r["model"], r["precision"], workload(r),
          str(len(r["ratio"])),
          f"**{r['ratio_median']:.1f}** [{min(r['ratio']):.1f}, {max(r['ratio']):.1f}]",
          f"{r['ratio_best']:.1f}"] for r in records], (4, 5, 6))


def parts_text(records: Sequence[dict[str, Any]]) -> str:
    """Where a step's time goes, on both sides."""
    if not records:
        return ""
    rows = []
    for r in records:
        medians = {f"{part} {side}": statistics.median(r[f"seconds_{part}"][side])
                   for part in ("sampling", "update") for side in ("ours", "trl")}
        rows.append([r["model"], r["precision"], r["groups"],
                     f"{r['ratio_sampling_median']:.2f}", f"{r['ratio_update_median']:.2f}",
                     *(f"{medians[f'{part} {side}']:.2f}" for side in ("ours", "trl")
                       for part in ("sampling", "update")),
                     f"{r['check']['gradient_distance']:.1e}",
                     f"{r['check']['loss_difference']:.1e}"])
    return "Parts of a step against TRL, and the check before it (same completions):\n\n" + (
        markdown_table(["model", "precision", "groups", "ratio of sampling", "ratio of update",
                        "ours: sampling, s", "update, s", "TRL: sampling, s", "update, s",
                        "gradients differ by", "losses differ by"], rows, range(3, 11)))


def settings_text(record: dict[str, Any]) -> str:
    """Both sides' settings, where they were kept."""
    if "settings" not in record:
        return ""
    title = f"{OTHER_SIDE[record['benchmark']]}, {record['model']}, {record['precision']}"
    if "groups" in record:
        title += f", groups: {record['groups']}"
    return f"{title}:\n\n" + "\n".join(
        f"- {side}: " + ", ".join(f"`{key}={value}`" for key, value in values.items())
        for side, values in record["settings"].items())


def ceiling_table(records: Sequence[dict[str, Any]]) -> str:
    """The ceilings, and the shares that are reached."""
    rows = [[r["model"], r["precision"], f"{r['product_gflops']['fp32']:.0f}",
             f"{r['product_gflops']['bf16']:.0f}", f"{r['copy_gb_per_second']:.1f}",
             *(f"{r[part]['share_median']:.2f} [{min(r[part]['share']):.2f}, "
               f"{max(r[part]['share']):.2f}]" if part in r else "not measured"
               for part in ("sampling", "update_products", "update"))]
            for r in records]
    return markdown_table(
        ["model", "precision", "large product fp32, GFLOP/s", "bf16, GFLOP/s",
         "large copy, GB/s", "sampling, share of its products alone",
         "update, share of its products alone", "update, share of the large product"], rows,
        range(2, 8))


def bounds_text(ceilings: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> str:
    """What the update cannot get below, from what was measured; a line a model and precision."""
    lines = []
    for r in ceilings:
        if "update_kernels" not in r:
            continue
        shares, update = r["update_kernels"], r["update"]["share_median"]
        kernels = sum(shares.values())
        alone = statistics.median(r["update_products"]["gflops"]) / (
            r["product_gflops"][r["precision"]])
        line = (f"- {r['model']}, {r['precision']}: of an update's time products take "
                f"{shares['products']:.2f}, attention {shares['attention']:.2f} and the activation "
                f"function {shares['activation']:.2f}. Its products alone, of the same shapes, "
                f"reach {alone:.2f} of the large product's speed. If the rest took no time, the "
                f"update would reach {update / kernels:.2f} of it")
        for step in steps:
            if (step["model"], step["precision"]) != (r["model"], r["precision"]):
                continue
            ours = {part: statistics.median(step[f"seconds_{part}"]["ours"])
                    for part in ("sampling", "update")}
            theirs = statistics.median(step["seconds"]["trl"])
            line += (f", and a step with {step['groups']} groups "
                     if step["groups"] == "all" else ", one with half of them without signal "
                     ) + f"{theirs / (ours['sampling'] + ours['update'] * kernels):.1f} times TRL's"
        lines.append(line + ".")
    return "" if not lines else (
        "What bounds the update (the rest are norms, rotary embedding, copies, the loss, the "
        "optimizer and the calls themselves; the profiler that tells them apart makes the rest "
        "look larger than it is). Measured with answers as long as the cap, in the fastest "
        "micro-batches; the steps above have answers and micro-batches of their own, so that their "
        "numbers are near, not exact:\n\n" + "\n".join(lines))


def full_size_table(record: dict[str, Any]) -> str:
    """A line a setup, with all weights or with LoRA."""
    return markdown_table(
        ["setup", "adapter", "steps", "weights trained", "peak memory, MiB", "estimated, MiB",
         "minutes", "all gradients finite"],
        [[r["setup"], r["adapter"], str(r["steps"]), f"{r['trained']:,}",
          f"{r['measured_peak_mib']:,}", f"{r['estimated_peak_mib']:,}", f"{r['minutes']:.1f}",
          "yes" if r["finite"] else "no"] for r in record["runs"]], range(2, 7))


def overhead_table(record: dict[str, Any]) -> str:
    """A line a setup and stage: what the method adds to a step besides its own passes."""
    return markdown_table(
        ["setup", "stage", "overhead, % of a step"],
        [[name, stage, f"{100 * share:+.1f}"] for name, found in record["overhead"].items()
         for stage, share in found.items()], (2,))


def scaling_section(record: dict[str, Any], path: Path) -> list[str]:
    """Two pictures of curves and one of the memory at a large vocabulary."""
    points, text = record["points"], []
    curves = {axis: named for axis, named in AXES.items() if axis in points}
    for key, label in (("seconds", "time (s)"), ("peak_mib", "peak memory (MiB)")):
        with style():
            save(draw_curves(points, curves, key, label), path, key)
        text.append(f"![{label} against the sizes]({path.stem}-{key}.png)")
    if "vocabulary" in points:
        with style():
            save(draw_vocabulary(points["vocabulary"]), path, "vocabulary")
        text += [f"![peak memory at a large vocabulary]({path.stem}-vocabulary.png)",
                 f"Update at {points['vocabulary'][0]['vocabulary']:,} words and "
                 f"{points['vocabulary'][0]['micro_batch_tokens']:,} tokens a micro-batch: the "
                 f"largest peak is {record['vocabulary_peak_ratio']:.2f} times the smallest, and "
                 f"{record['vocabulary_above_resting_ratio']:.2f} times above the resting memory."]
    base = record["base"]
    text.append(f"Random Qwen2 models, {record['precision']}, {record['threads']} threads. What is "
                f"not on an axis: {base['prompts']} prompts x {base['samples']} completions of "
                f"{base['length']} tokens, width {base['width']}, {base['layers']} layers. Peak "
                "memory is the process's, with the libraries it imports, or the GPU's.")
    return text


def draw_curves(points: dict[str, list[dict]], curves: dict[str, tuple[str, str]], key: str,
                label: str) -> Figure:
    """A panel an axis, sampling and update as lines."""
    figure, panels = new_figure(4.6, rows=2, columns=2)
    for panel, (axis, (field, title)) in zip(panels.flat, curves.items(), strict=False):
        handles = []
        for number, part in enumerate(("sampling", "update")):
            line = [p for p in points[axis] if p["part"] == part]
            handles += panel.plot([p[field] for p in line], [p[key] for p in line], label=part,
                                  color=palette()[number], marker=MARKERS[number])
        panel.set(xlabel=title, ylabel=label, xscale="log", ylim=(0, None))
        if field != "parameters":
            ticks = [p[field] for p in points[axis] if p["part"] == "update"]
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
    for panel in list(panels.flat)[len(curves):]:
        panel.set_visible(False)
    legend_below(figure, handles, 2)
    return figure


def draw_vocabulary(points: list[dict]) -> Figure:
    """The update's peak memory against the length of the completions."""
    figure, panel = new_figure(2.6)
    lengths = [p["length"] for p in points]
    for number, (key, label) in enumerate((("peak_mib", "peak"),
                                           ("resting_mib", "model and optimizer alone"))):
        panel.plot(lengths, [p[key] for p in points], label=label, color=palette()[number],
                   marker=MARKERS[number])
    panel.set(xlabel="completion length (tokens)", ylabel="memory (MiB)", ylim=(0, None),
              xscale="log")
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.minorticks_off()
    panel.legend()
    return figure


def save(figure: Figure, path: Path, name: str) -> None:
    path.with_name(f"{path.stem}-{name}.png").write_bytes(as_bytes(figure, "png"))
