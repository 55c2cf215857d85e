-- Examples of a feature that a language model judged wrongly by the feature's label.
--
-- Grain:   one row per label's feature and source, judging model, method and token.
-- Reads:   src_explanation_mistakes
-- Units:   asked is true if the feature fires there; answered is what the model said.
-- Ask it:  select count(*) from stg_explanation_mistakes
create or replace view stg_explanation_mistakes as
select feature_id, src_explanation_mistakes.source, model, method, stratum, token_id, asked, answered
from src_explanation_mistakes;
