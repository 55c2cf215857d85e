-- The name a feature goes by.
--
-- Grain:   one row per feature with a label.
-- Reads:   src_labels
-- Units:   our own label before imported ones, of these the one with the best score, then the first in text order.
-- Ask it:  what is feature 12 called?
create or replace view feature_names as
select feature_id, first(label order by source = 'own' desc, score desc nulls last, label) as label
from src_labels
group by feature_id;
