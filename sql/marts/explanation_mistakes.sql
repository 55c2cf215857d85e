-- The examples that cost a feature's labels points: where the label and the feature disagree.
--
-- Grain:   one row per source of the label, judging model, method and token, in that order; n rows at most.
-- Reads:   stg_explanation_mistakes, token_texts
-- Units:   asked is true if the feature fires in the context (for fuzzing: at the marked tokens); answered is what the
--          model said by the label, always the opposite. stratum is that of explanation_scores; context shows 12 tokens
--          on either side. Tokens of forgotten documents are left out.
-- Parameters: feature bigint, n bigint = 100
-- Ask it:  where does the label of feature 12 fail?  from explanation_mistakes(12)
create or replace macro explanation_mistakes(feature, n := 100) as table
with chosen as materialized (
    from stg_explanation_mistakes where feature_id = feature
)
select
    chosen.source,
    chosen.model,
    chosen.method,
    chosen.stratum,
    token_id,
    chosen.asked,
    chosen.answered,
    found.piece,
    found.context,
    found.key,
    found.position
from chosen
join token_texts((select list(distinct token_id) from chosen), 12, 12) as found using (token_id)
order by chosen.source, chosen.model, chosen.method, token_id
limit n;
