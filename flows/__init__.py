"""Prefect flows: the only place that knows Prefect. Read `pipeline` first.

pipeline      everything, from text to SQL answers
tokens        documents to tokens
import_table  a table to activations
collect       tokens to activations
train         activations to SAEs
encode        activations to feature values
compact       the parts of a run merged
evaluate      the figures and the picture of a run
ingest        new documents through every stage
retrain       a new SAE once the store has grown
tidy          the nightly compaction of a store
verify        a share of the store read back
gc            what no reader can reach is removed
support       what the flows share, and what brings them to a server
"""

import os

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# The first start of Prefect's temporary server makes its database: longer than the usual 20 s on a busy machine.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
