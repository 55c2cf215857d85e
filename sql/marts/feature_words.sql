-- What some features look like in words: where they fire, and what they make the model say next.
--
-- Grain:   one row per feature of the list, by feature.
-- Reads:   stg_feature_vocab, stg_logits, stg_vocab, feature_names
-- Units:   pieces are the 3 vocabulary entries on which the feature fires most often, the commonest first. promotes
--          are the 3 next tokens whose logits it pushes up most, the first the most; empty without logits.
-- Parameters: features bigint[]
-- Ask it:  what are features 12 and 13 about?  from feature_words([12, 13])
create or replace macro feature_words(features) as table
with wanted as materialized (
    select distinct unnest(features)::bigint as feature_id
),
ranked as (
    select
        feature_id,
        vocab_id,
        'fires' as side,
        row_number() over (partition by feature_id order by n_tokens desc, vocab_id) as place
    from stg_feature_vocab
    where feature_id in (select feature_id from wanted)
    union all
    select
        feature_id,
        vocab_id,
        'promotes',
        row_number() over (partition by feature_id order by logit desc, vocab_id)
    from stg_logits
    where logit > 0 and feature_id in (select feature_id from wanted)
),
spelt as (
    select
        feature_id,
        list(piece order by place) filter (where side = 'fires')    as pieces,
        list(piece order by place) filter (where side = 'promotes') as promotes
    from ranked
    join stg_vocab using (vocab_id)
    where place <= 3
    group by feature_id
)
select
    feature_id,
    feature_names.label,
    coalesce(pieces, [])   as pieces,
    coalesce(promotes, []) as promotes
from wanted
left join spelt using (feature_id)
left join feature_names using (feature_id)
order by feature_id;
