-- The names that features were given.
--
-- Grain:   one row per label: a feature may have several, our own first, then the best score.
-- Reads:   stg_labels
-- Units:   source is own, or where the label was imported from; score is 0 to 1, null where nobody judged it.
-- Ask it:  which features have a name?
create or replace view feature_labels as
select feature_id, label, source, score
from stg_labels
order by feature_id, source = 'own' desc, score desc nulls last, label;
