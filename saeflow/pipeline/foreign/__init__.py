"""What was made elsewhere and joins a pipeline. Read `import_table` first.

import_table  a table to activations
import_sae    an SAE trained elsewhere: does it fit, what does it explain, and what is odd about it
"""
