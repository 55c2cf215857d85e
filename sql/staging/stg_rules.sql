-- Explanations of features without a language model, with the figures that they were tested to have.
--
-- Grain:   one row per explained feature.
-- Reads:   src_rules
-- Units:   precision, recall and f1 are of held-out tokens, 0 to 1; null if there is none to count. feature_rules says
--          more.
-- Ask it:  which features have a rule?
create or replace view stg_rules as
select feature_id, rule, kind, "precision", recall, score as f1
from src_rules
where feature_id is not null;
