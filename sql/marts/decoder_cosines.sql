-- How close each feature's direction is to its nearest neighbour's.
--
-- Grain:   one row per bin of cosines that has features, the lowest first; none if the run has no similar features.
-- Reads:   stg_similar
-- Units:   a feature's nearest neighbour is the other feature whose decoder row has the largest cosine with its own. A
--          bin holds cosines from from_cosine to below to_cosine, the last bin with 1 in it. share is the bin's share
--          of the features.
-- Ask it:  how many features are nearly copies of one another (cosine above 0.9)?
create or replace view decoder_cosines as
with nearest as (
    select least(floor(max(cosine)::double * 20), 19)::bigint as bin from stg_similar group by feature_id
)
select
    bin / 20                         as from_cosine,
    (bin + 1) / 20                   as to_cosine,
    count(*)                         as n_features,
    count(*) / sum(count(*)) over () as share
from nearest
group by bin
order by bin;
