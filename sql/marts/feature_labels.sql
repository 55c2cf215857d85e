-- The labels that features were given.
--
-- Grain:   one row per label. By feature; of one feature its own labels first and those of source rules last, else by
--          score, label and source.
-- Reads:   stg_labels
-- Units:   source is own, or names the tool that the label comes from; score is 0 to 1, null if nobody scored
--          the label.
-- Ask it:  which features have a label?
create or replace view feature_labels as
select feature_id, label, source, score
from stg_labels
order by feature_id, source = 'own' desc, source = 'rules', score desc nulls last, label, source;
