-- True; an error if a list of features is empty or has another number of thresholds.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   the lists may have any type.
-- Ask it:  select same_length([12, 34], [0, 0.5])
create or replace macro same_length(features, thresholds) as
case
    when len(features) > 0 and len(features) = len(thresholds) then true
    else error('features and thresholds must be lists of one length, with a threshold for each feature')
end;
