-- Labels of features.
--
-- Grain:   one row per label; a feature may have several or none.
-- Reads:   src_labels
-- Units:   source is own, or names the tool that the label was imported from; score is 0 to 1 or null.
-- Ask it:  which features have a label of our own?
create or replace view stg_labels as
select feature_id, label, src_labels.source, score from src_labels;
