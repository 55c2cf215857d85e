-- The best label of each feature.
--
-- Grain:   one row per feature with a label.
-- Reads:   src_labels
-- Units:   its own label counts before those of other people and tools, and these before one that `saeflow explain`
--          made without a language model (source rules). Then the best score counts, then the first in text order.
-- Ask it:  what is feature 12 called?
create or replace view feature_names as
select
    feature_id,
    first(
        label
        order by src_labels.source = 'own' desc, src_labels.source = 'rules', score desc nulls last, label
    ) as label
from src_labels
group by feature_id;
