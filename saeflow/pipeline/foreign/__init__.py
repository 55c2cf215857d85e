"""What was made elsewhere and joins a pipeline.

import_sae  an SAE trained elsewhere: does it fit, what does it explain, and what is odd about it
"""
