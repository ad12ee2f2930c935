"""Builds the page of the blind comparison: a question, two answers, and a judgment. Needs the extra `demo`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr

from hf_decoder.evaluation.blind_comparison import JudgmentFile, Pair
from hf_decoder.serving.local_page import NARROWEST, escaped

LABELS = {
    "left": "This one is better (1)",
    "right": "This one is better (2)",
    "tie": "Tie (t)",
    "both_bad": "Both bad (b)",
}
KEYS_SCRIPT = """<script>
addEventListener('keydown', event => {
  const name = {'1': 'left', '2': 'right', 't': 'tie', '0': 'tie', 'b': 'both_bad', 'u': 'undo'}[event.key];
  const typed = event.target.closest('input, textarea') || event.ctrlKey || event.metaKey || event.altKey;
  if (name && !typed && !event.repeat) document.getElementById(name)?.click();
});
</script>"""
# One judgment at a time, whoever has the page open.
ONE: dict[str, Any] = {"concurrency_id": "judgment", "concurrency_limit": 1, "api_visibility": "private"}


class ComparisonPage:
    """Shows the pairs of a `JudgmentFile`, and writes each judgment to it before the next pair is shown.

    Nothing tells which model wrote an answer until all are judged and the result is asked for.
    """

    def __init__(self, file: JudgmentFile, pairs: Sequence[Pair]):
        self.file, self.pairs = file, list(pairs)

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="Which answer is better?", analytics_enabled=False) as page:
            progress = gr.HTML(elem_id="progress")
            key = gr.State()
            with gr.Column(visible=False) as judging:
                question = gr.HTML(elem_id="question")
                answers, buttons = [], {}
                with gr.Row():
                    for side in ("left", "right"):
                        with gr.Column(min_width=NARROWEST):
                            answers.append(gr.HTML(elem_id=f"answer_{side}"))
                            buttons[side] = gr.Button(LABELS[side], variant="primary", elem_id=side)
                with gr.Row():
                    for choice in ("tie", "both_bad"):
                        buttons[choice] = gr.Button(LABELS[choice], elem_id=choice, min_width=120)
                note = gr.Textbox(label="Note: write it before you judge", elem_id="note", max_lines=4)
            result = gr.HTML(elem_id="result")
            with gr.Row():
                undo = gr.Button("Undo (u)", elem_id="undo", min_width=120, interactive=False)
                end = gr.Button("Show the result", elem_id="end", variant="primary", min_width=120, visible=False)
            shown = [progress, key, judging, question, *answers, note, undo, end]
            for choice, button in buttons.items():
                button.click(partial(self.judge, choice), [key, note], shown, **ONE)
            undo.click(self.undo, None, shown, **ONE)
            end.click(self.end, None, [result, undo, end], **ONE)
            page.load(self.show, None, shown, **ONE)
        return page

    def show(self) -> tuple[Any, ...]:
        """The next pair that is not judged, in the order of the page's parts."""
        left = self.file.remaining(self.pairs)
        can_undo = gr.update(interactive=self.file.can_undo)
        if not left:
            said = "<p>Every pair is judged.</p>"
            return said, None, gr.update(visible=False), "", "", "", "", can_undo, gr.update(visible=True)
        pair, number = left[0], len(self.pairs) - len(left) + 1
        said = f"<p><b>{number} of {len(self.pairs)}:</b> which answer is better?</p>"
        texts = [f'<pre class="shown">{escaped(text)}</pre>' for text in (pair.prompt, pair.left, pair.right)]
        return said, pair.key, gr.update(visible=True), *texts, "", can_undo, gr.update(visible=False)

    def judge(self, choice: str, key: str | None, note: str) -> tuple[Any, ...]:
        """Writes a judgment of the pair with this key, unless another browser did, and goes on."""
        pair = next((pair for pair in self.pairs if pair.key == key), None)
        if pair is not None:
            self.file.add(pair, choice, note.strip())
        return self.show()

    def undo(self) -> tuple[Any, ...]:
        self.file.undo()
        return self.show()

    def end(self) -> tuple[Any, ...]:
        """The result, with the names; the browser that knows them takes no judgment back."""
        if self.file.remaining(self.pairs):
            raise gr.Error("Not every pair is judged.")
        lines = "".join(f"<p>{escaped(line)}</p>" for line in self.file.tally(self.pairs).lines(self.file.names))
        lines += "<p>All judgments are on the disk; the page can be closed.</p>"
        return lines, gr.update(visible=False), gr.update(visible=False)
