"""The quickstart of each family (`upcycle quickstart`), on data that needs no download."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Job:
    """The quickstart of one family.

    Attributes:
      summary: the family and its data, in words.
      title: of the report.
      task: the data, in words.
      counts: what its accuracy counts, in the plural.
      model, moe, data, settings: gin files in the order of inclusion; the run's own comes before `settings`.
      dense_steps, upcycle_steps: at --budget=1. Steps of the other two branches follow from equal FLOPs.
      cooldown_steps: at --budget=1: last steps of each branch (not the dense run), over which the learning rate falls to 0.
      prompt: a text that the model of each branch continues; '' for families that generate none.
      export: format in which the upcycled model is also written, and read back; '' for none.
    """

    summary: str
    title: str
    task: str
    counts: str
    model: str
    moe: str
    data: str
    settings: str
    dense_steps: int
    upcycle_steps: int
    cooldown_steps: int = 0
    prompt: str = ''
    export: str = ''


JOBS = {
    'language': Job(
        summary='T5 on text',
        title='Sparse upcycling on embedded text',
        task='stdlib_span_corruption: span corruption of the source code of the running Python, tokens are bytes',
        counts='tokens',
        model='models/t5_1_1_mini.gin',
        moe='moe/t5.gin',
        data='tasks/stdlib_span_corruption.gin',
        settings='runs/quickstart.gin',
        dense_steps=2000,
        upcycle_steps=2000,
    ),
    'vision': Job(
        summary='ViT on images',
        title='Sparse upcycling on embedded images',
        task='mnist5k: 5,000 scanned digits of 28 x 28 pixels, distorted anew in every epoch',
        counts='images',
        model='models/vit_mini.gin',
        moe='moe/vit.gin',
        data='tasks/mnist5k.gin',
        settings='runs/quickstart_vision.gin',
        dense_steps=10000,
        upcycle_steps=4000,
        cooldown_steps=1000,
    ),
    'llm': Job(
        summary='a decoder-only model on text',
        title='Sparse upcycling of a language model on embedded text',
        task='stdlib_bytes: next tokens of the source code of the running Python, tokens are bytes',
        counts='tokens',
        model='models/llm_mini.gin',
        moe='moe/llm.gin',
        data='tasks/stdlib_bytes.gin',
        settings='runs/quickstart_llm.gin',
        dense_steps=1500,
        upcycle_steps=1500,
        cooldown_steps=400,
        prompt='import os\n\n\ndef ',
        export='huggingface',
    ),
}
