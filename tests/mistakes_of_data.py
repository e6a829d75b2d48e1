"""What a user gets wrong about objectives, packing, curricula and blends: words or edits of a file, and the hint."""

WARMUP = "length_warmup=LengthWarmup length_warmup.lengths=(16,64) length_warmup.pacing=FixedLinear "
WARMUP += "length_warmup.pacing.first=16 length_warmup.pacing.last=64 length_warmup.pacing.steps=5 "
CURRICULUM = "curriculum=Curriculum curriculum.pacing=FixedLinear curriculum.pacing.first=1 "
CURRICULUM += "curriculum.pacing.last=100 curriculum.pacing.steps=5 "

MISTAKES = {
    "CausalLm": [
        ("objective=Causal", "objective=Causal must be one of CausalLm, PrefixLm, FillInTheMiddle, MaskedLm, "),
        ("objective.rate=0.5", "objective.rate: CausalLm has no field 'rate'; FillInTheMiddle, MaskedLm have it: add "),
        (
            "model.causal=false",
            "objective=CausalLm is for causal models, and model.causal=false sees what is to be guessed; try "
            "model.causal=true, or a masked objective.",
        ),
    ],
    "PrefixLm": [
        ("objective=PrefixLm packing=BestFit", "packing=BestFit goes with objective=CausalLm, not PrefixLm; try "),
        (
            "objective=PrefixLm model.attention.backend=cudnn",
            "model.attention.backend=cudnn",
        ),
    ],
    "FillInTheMiddle": [
        (
            "objective=FillInTheMiddle",
            "model.vocab_size=257 is smaller than the 257 tokens of data=PythonDocs and 6 special ones of "
            "objective=FillInTheMiddle; try model.vocab_size=263.",
        ),
        ("objective=FillInTheMiddle objective.rate=2 model.vocab_size=263", "objective.rate=2.0 must lie in 0..1"),
    ],
    "MaskedLm": [
        (
            "objective=MaskedLm model.vocab_size=263",
            "objective=MaskedLm is for models that see both ways, and model.causal=true; try model.causal=false.",
        ),
        (
            "objective=MaskedLm objective.rate=1 model.vocab_size=263 model.causal=false",
            "objective.rate=1.0 must lie strictly between 0 and 1; try 0.15.",
        ),
    ],
    "SentencePairs": [
        (
            "objective=SentencePairs model.vocab_size=263 model.causal=false",
            "objective=SentencePairs needs a head for pairs, and model.pairs=false; try model.pairs=true.",
        ),
        ("model.pairs=true", "model.pairs=true reads pairs, and objective=CausalLm makes none; try model.pairs=false."),
    ],
    "SpanCorruption": [
        (
            "objective=SpanCorruption",
            "model.vocab_size=257 is smaller than the 257 tokens of data=PythonDocs and 9 special ones of ",
        ),
        (
            "objective=SpanCorruption objective.mean_span_tokens=0.5 model.vocab_size=300",
            "objective.mean_span_tokens=0.5 must be at least 1; try 3.",
        ),
        (
            "objective=SpanCorruption batch.sequence_length=2 model.vocab_size=300",
            "batch.sequence_length=2 is too short to corrupt spans; try batch.sequence_length=64.",
        ),
    ],
    "Completion": [("objective=Completion packing=BestFit", "packing=BestFit goes with objective=CausalLm, not Comp")],
    "Concatenate": [
        ("packing=Concat", "packing=Concat must be one of Concatenate, BestFit; did you mean Concatenate?"),
        ("packing.isolate_documents=maybe", "packing.isolate_documents=maybe must be true or false."),
    ],
    "BestFit": [
        ("packing=BestFit packing.isolate_documents=false", "packing.isolate_documents: BestFit has no field 'isola"),
    ],
    "Curriculum": [
        ("curriculum=Curriculum", "curriculum=Curriculum needs curriculum.pacing=... too."),
        (
            CURRICULUM.replace("last=100", "last=50"),
            "curriculum.pacing=FixedLinear(first=1, last=50, steps=5) must end at 100 percent, or some samples are ",
        ),
    ],
    "Length": [(CURRICULUM + "curriculum.metric=Lenght", "must be one of Length, Rarity, MetricFile; did you mean Le")],
    "Rarity": [(CURRICULUM + "curriculum.metric=Rarity curriculum.metric.path=x", "Rarity has no field 'path'")],
    "MetricFile": [
        (
            CURRICULUM + "curriculum.metric=MetricFile",
            "curriculum.metric=MetricFile needs curriculum.metric.path=... too.",
        )
    ],
    "FixedLinear": [
        (CURRICULUM.replace("first=1", "first=0"), "curriculum.pacing.first=0 must be at least 1."),
        (CURRICULUM.replace("last=100", "last=0"), "curriculum.pacing.last=0 must be at least first=1."),
    ],
    "FixedRoot": [
        (
            CURRICULUM.replace("FixedLinear", "FixedRoot") + "curriculum.pacing.degree=0",
            "curriculum.pacing.degree=0 must be at least 1.",
        ),
    ],
    "FixedDiscrete": [
        (
            "curriculum=Curriculum curriculum.pacing=FixedDiscrete curriculum.pacing.difficulties=(50,100) "
            "curriculum.pacing.until_steps=()",
            "curriculum.pacing.until_steps=() must hold one step less than there are difficulties.",
        ),
    ],
    "LengthWarmup": [
        (WARMUP.replace("(16,64)", "(64,16)"), "length_warmup.lengths=(64, 16) must ascend from 1 or more; try 128,"),
        (
            WARMUP + "batch.sequence_length=128",
            "length_warmup.lengths ends at 64, and batch.sequence_length=128; the last must be the whole row: try "
            "batch.sequence_length=64.",
        ),
        (
            WARMUP.replace("(16,64)", "(18,64)") + "mesh.data=2 mesh.model=4 layout.sequence_parallel=true",
            "length_warmup.lengths=(18, 64) holds 18, which does not divide over mesh.model=4 "
            "(layout.sequence_parallel); try multiples of 4.",
        ),
    ],
    "Blend": [
        ("data=Blend", "data=Blend needs data.sources=... too."),
    ],
    "TfdsText": [
        ("data=TfdsText", "data=TfdsText needs data.name=... too."),
        (
            "data=TfdsText data.name=a data.data_dir=no",
            "data.data_dir=no is no folder; name the one that TFDS keeps data",
        ),
        ("data=TfdsText data.name=a data.paths=b", "data.paths: TfdsText has no field 'paths'"),
    ],
    "SeqioTask": [
        ("data=SeqioTask data.module=my_pkg.tasks", "data=SeqioTask needs data.mixture=... too."),
        (
            "data=SeqioTask data.module=my-tasks data.mixture=a",
            "data.module=my-tasks is no name of a module; say it as in import, such as my_pkg.tasks.",
        ),
    ],
    "Live": [
        (
            "data=SeqioTask data.module=a data.mixture=b data.reader=Lives",
            "data.reader=Lives must be a Live or None; did you mean Live?",
        ),
    ],
}


def edit(sources: str, more: str = "") -> tuple[str, str]:
    return "data=PythonDocs()", f"data=__import__('data').Blend(sources=({sources}){more})"


ONE = "__import__('data').Weighted(name='a', data=PythonDocs()),"
FILE_MISTAKES = [
    (edit(ONE * 2), "data.sources=", "has the name a twice; each needs its own."),
    (edit(ONE.replace("'a'", "'a b'")), "data.sources[0].name=a b must be letters, digits, _, . or -, for it names me"),
    (edit(ONE.replace("PythonDocs()", "PythonDocs(validation_fraction=0.0)")), "data.sources[0].data.validation_fract"),
    (edit(ONE.replace("PythonDocs()", "None")), "data.sources", "must be"),
    (edit(ONE, ", temperature=0.0"), "data.temperature=0.0 must be positive; None takes the weights as they are."),
    (
        edit(ONE, ", phases=(__import__('data').Phase(start_sample=5, weights=(1, 2)),)"),
        "data.phases=(Phase(start_sample=5, weights=(1, 2)),) must give each of the 1 sources a weight of at least 0, ",
    ),
]
