"""What a run needs that teaches nothing about GPT-2, SFT or DPO: files, processes, resuming, flags.

    errors      what is reported to the person at the prompt in one sentence
    parallel    several processes under torchrun, and the choice of a device
    files       files that are written whole or not at all; downloads
    hub         GPT-2's weights in the layout of the Hugging Face hub
    json_lines  files with one JSON object per line, and the names of other formats
    rows        the layouts of preferences and texts in such a file
    packing     which answer goes into which row of a batch
    checkpoint  sft.pt and dpo.pt: a model, its tokenizer and where it came from
    memory      how many micro-batches fit in the free memory
    run         the log, the training state that --resume needs, Ctrl-C
    cli         flags, defaults and error messages shared by the scripts
"""
