-- Probes of a few dimensions for each class, as the newest `saeflow probe --sparse` of each annotation found them.
--
-- Grain:   one row per annotation, class, basis and k.
-- Reads:   src_sparse_probes
-- Units:   see sparse_probes. A later probe without --sparse does not hide them while the values are the same.
-- Ask it:  how well do 5 features tell digits?
create or replace view stg_sparse_probes as
select probes.annotation, probes.class, basis, k, auroc, f1, n_train, n_test, dimensions
from src_sparse_probes as probes;
