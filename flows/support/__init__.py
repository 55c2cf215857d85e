"""What the flows share, and what brings them to a server.

tasks        a task a part, retries, ending well, one flow run a GPU
reporting    what a page shows while a flow works
page         text and pictures as markdown
deployments  which flows a server starts, when, and how many at once
serve        what `saeflow serve` asks of Prefect
"""
