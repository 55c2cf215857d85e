-- Tokens at which a feature and what is said of it disagree.
--
-- Grain:   one row per source of the label, feature, judging model, method and token.
-- Reads:   src_explanation_mistakes
-- Units:   asked is true if the feature fires there. answered is what a language model said by the label, or what the
--          rule says (method rule; model is then null).
-- Ask it:  select count(*) from stg_explanation_mistakes
create or replace view stg_explanation_mistakes as
select
    feature_id,
    src_explanation_mistakes.source,
    nullif(model, '') as model,
    method,
    stratum,
    token_id,
    asked,
    answered
from src_explanation_mistakes;
