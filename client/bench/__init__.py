"""The load generator behind `biphase bench`: open-loop load over the gRPC client, and what came of it.

Pure: lengths, arrivals, goals, summary. Shells: prompts and files, the runner, progress, the report, the command.
"""
