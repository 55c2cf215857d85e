-- How well k features, k neurons, or k directions of a random SAE tell a class of tokens from the rest.
--
-- Grain:   one row per annotation, class, basis and k; by annotation, class and k, the features first.
-- Reads:   stg_sparse_probes
-- Units:   basis is features, neurons (the stored activations) or random (an SAE of random directions that fires
--          as often). auroc and f1 are those of a logistic regression on documents that it has not seen; n_train and
--          n_test count tokens. dimensions are the k that were chosen, on the training documents alone. Made by
--          `saeflow probe NAME --sparse`.
-- Ask it:  are features better than neurons?
create or replace view sparse_probes as
select probes.annotation, probes.class, k, basis, auroc, f1, n_train, n_test, dimensions
from stg_sparse_probes as probes
order by probes.annotation, probes.class, k, basis <> 'features', basis;
