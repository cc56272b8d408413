"""The ground floor: what a run needs that teaches nothing about GPT-2, SFT or DPO. Nothing here
imports the five files or tasks/.

    errors      what is reported to the person at the prompt in one sentence
    parallel    several processes under torchrun; device, precision and compilation
    files       files that are written whole or not at all; caches; downloads
    hub         GPT-2's weights in the layout of the Hugging Face hub
    json_lines  files with one JSON object per line, and the names of other formats
    rows        the layouts of preferences and texts in such a file
    packing     which answer goes into which row of a batch
    statistics  means, standard errors, intervals
    report      tables and samples for the terminal
    memory      how many micro-batches fit in the free memory
    log         means since the last line, on the screen and in a CSV file
    run         what the steps of a training loop share: log, training state, Ctrl-C
    cli         how a command begins and ends; the parser
    flags       flags that commands share, and how --help states their defaults
"""
